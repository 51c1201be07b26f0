use std::collections::BTreeSet;

use super::error::Error;
use super::quote::{Measurement, ReportData, TdReport};
use super::verify::{TcbStatus, VerifiedQuote};

/// What a verified quote must say. A TD under debug never gets this far.
#[derive(Clone, Debug)]
pub struct Policy {
    mrtd: Option<Measurement>,
    rtmrs: [Option<Measurement>; 4],
    report_data: Option<ReportData>,
    tcb_statuses: BTreeSet<TcbStatus>,
}

impl Policy {
    /// Allows TDs with this firmware on platforms that are up to date. Firmware alone names no guest: add RTMRs.
    pub fn for_mrtd(mrtd: Measurement) -> Self {
        Self { mrtd: Some(mrtd), ..Self::any_td_that_caller_authorises() }
    }

    /// Allows any TD on platforms that are up to date. **The caller authorises**, with what [`TdReport`] says.
    pub fn any_td_that_caller_authorises() -> Self {
        Self {
            mrtd: None,
            rtmrs: [None; 4],
            report_data: None,
            tcb_statuses: BTreeSet::from([TcbStatus::UpToDate]),
        }
    }

    /// Also asks for these values of RTMR0 to RTMR3; `None` leaves one out.
    #[must_use]
    pub fn with_rtmrs(self, rtmrs: [Option<Measurement>; 4]) -> Self {
        Self { rtmrs, ..self }
    }

    /// Also asks for this report data, which binds the quote to a key or a challenge.
    #[must_use]
    pub fn with_report_data(self, report_data: ReportData) -> Self {
        Self { report_data: Some(report_data), ..self }
    }

    /// Also allows a TCB status other than [`TcbStatus::UpToDate`]. Intel calls none of them free of known flaws.
    #[must_use]
    pub fn allow_tcb_status(mut self, status: TcbStatus) -> Self {
        self.tcb_statuses.insert(status);
        self
    }

    fn check(&self, report: &TdReport, tcb_status: TcbStatus) -> Result<(), Error> {
        if !self.tcb_statuses.contains(&tcb_status) {
            return Err(Error::TcbStatus { actual: tcb_status });
        }
        check_measurement("MRTD", self.mrtd, report.mrtd)?;
        let names = ["RTMR0", "RTMR1", "RTMR2", "RTMR3"];
        for ((register, expected), actual) in names.into_iter().zip(self.rtmrs).zip(report.rtmrs) {
            check_measurement(register, expected, actual)?;
        }
        match self.report_data {
            Some(expected) if expected != report.report_data => {
                Err(Error::ReportData { expected: expected.into(), actual: report.report_data.into() })
            }
            _ => Ok(()),
        }
    }
}

fn check_measurement(
    register: &'static str,
    expected: Option<Measurement>,
    actual: Measurement,
) -> Result<(), Error> {
    match expected {
        Some(expected) if expected != actual => Err(Error::Measurement { register, expected, actual }),
        _ => Ok(()),
    }
}

impl VerifiedQuote {
    /// Compares the quote with a policy.
    ///
    /// # Errors
    /// The first rule of the policy that is not met.
    pub fn appraise(self, policy: &Policy) -> Result<AppraisedQuote, Error> {
        policy.check(self.report(), self.tcb_status())?;
        Ok(AppraisedQuote(self))
    }
}

/// A verified quote that meets a policy. Only [`VerifiedQuote::appraise`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppraisedQuote(VerifiedQuote);

impl std::ops::Deref for AppraisedQuote {
    type Target = VerifiedQuote;

    fn deref(&self) -> &VerifiedQuote {
        &self.0
    }
}
