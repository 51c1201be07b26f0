use std::fmt;

use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::intel::{quote_ca_with, quote_fmspc_with};
use dcap_qvl::quote::Quote;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::Error;
use super::quote::trimmed;
use super::verify::{AwsLc, MAX_QUOTE_LEN};

/// The longest collateral that is looked at. Real ones have 20 KB, most of it the revocation list of PCK certificates.
pub const MAX_COLLATERAL_LEN: usize = 1024 * 1024;

/// Which collateral a quote needs: the platform's model and the CA of its PCK certificate. Many platforms share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CollateralKey {
    fmspc: [u8; 6],
    ca: &'static str,
}

impl CollateralKey {
    /// Reads the key out of a quote that carries its PCK certificates, padded or not. Nothing is verified by that: it
    /// only says where to look.
    ///
    /// # Errors
    /// [`Error::QuoteTooLarge`], [`Error::Quote`], [`Error::TrailingBytes`], [`Error::Debug`].
    pub fn of(quote: &[u8]) -> Result<Self, Error> {
        if quote.len() > MAX_QUOTE_LEN {
            return Err(Error::QuoteTooLarge { actual: quote.len(), max: MAX_QUOTE_LEN });
        }
        let malformed = |reason: &dyn fmt::Display| Error::Quote { reason: reason.to_string() };
        let quote = Quote::parse(trimmed(quote)?).map_err(|error| malformed(&error))?;
        let fmspc = quote_fmspc_with::<AwsLc>(&quote).map_err(|error| malformed(&format!("{error:#}")))?;
        let ca = quote_ca_with::<AwsLc>(&quote).map_err(|error| malformed(&format!("{error:#}")))?;
        Ok(Self { fmspc, ca: ca.as_id_str() })
    }

    /// The platform's model (FMSPC).
    pub fn fmspc(&self) -> &[u8; 6] {
        &self.fmspc
    }

    /// The CA of the PCK certificate, as Intel's service names it: `platform` or `processor`.
    pub fn ca(&self) -> &'static str {
        self.ca
    }
}

/// The answers of Intel's provisioning certification service, version 4, or of a cache of it (PCCS).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcsAnswers {
    /// Body of `/sgx/certification/v4/pckcrl`, DER.
    pub pck_crl: Vec<u8>,
    /// Its header `SGX-PCK-CRL-Issuer-Chain`, PEM.
    pub pck_crl_issuer_chain: String,
    /// Body of `/tdx/certification/v4/tcb`, JSON.
    pub tcb_info: Vec<u8>,
    /// Its header `TCB-Info-Issuer-Chain`, PEM.
    pub tcb_info_issuer_chain: String,
    /// Body of `/tdx/certification/v4/qe/identity`, JSON.
    pub qe_identity: Vec<u8>,
    /// Its header `SGX-Enclave-Identity-Issuer-Chain`, PEM.
    pub qe_identity_issuer_chain: String,
    /// The root CA's revocation list, DER.
    pub root_ca_crl: Vec<u8>,
}

/// The signature is over the object's own bytes, so they are kept as they came.
#[derive(Deserialize)]
struct TcbInfoBody<'a> {
    #[serde(borrow, rename = "tcbInfo")]
    content: &'a RawValue,
    signature: String,
}

#[derive(Deserialize)]
struct QeIdentityBody<'a> {
    #[serde(borrow, rename = "enclaveIdentity")]
    content: &'a RawValue,
    signature: String,
}

/// What Intel publishes about platforms: certificates, revocation lists, TCB levels, each with its time of validity.
#[derive(Clone, Debug)]
pub struct Collateral(QuoteCollateralV3);

impl Collateral {
    /// Reads the JSON form of dcap-qvl's `QuoteCollateralV3`, which PCCS clients exchange.
    ///
    /// # Errors
    /// [`Error::CollateralTooLarge`] or [`Error::Collateral`].
    pub fn from_json(json: &[u8]) -> Result<Self, Error> {
        bounded(json.len())?;
        let collateral = serde_json::from_slice(json);
        collateral.map(Self).map_err(|error| Error::Collateral { reason: error.to_string() })
    }

    /// Puts the service's answers together. They are as yet unverified, as all collateral is.
    ///
    /// # Errors
    /// [`Error::CollateralTooLarge`] or [`Error::Collateral`].
    pub fn from_pcs(answers: PcsAnswers) -> Result<Self, Error> {
        let PcsAnswers {
            pck_crl,
            pck_crl_issuer_chain,
            tcb_info,
            tcb_info_issuer_chain,
            qe_identity,
            qe_identity_issuer_chain,
            root_ca_crl,
        } = answers;
        bounded(pck_crl.len() + tcb_info.len() + qe_identity.len() + root_ca_crl.len())?;
        let unreadable =
            |what: &str, reason: &dyn fmt::Display| Error::Collateral { reason: format!("{what}: {reason}") };
        let tcb: TcbInfoBody<'_> =
            serde_json::from_slice(&tcb_info).map_err(|error| unreadable("TCB info", &error))?;
        let qe: QeIdentityBody<'_> =
            serde_json::from_slice(&qe_identity).map_err(|error| unreadable("QE identity", &error))?;
        let signature =
            |what, text: &str| unhex(text).ok_or_else(|| unreadable(what, &"signature is not hex"));
        Ok(Self(QuoteCollateralV3 {
            pck_crl_issuer_chain,
            root_ca_crl,
            pck_crl,
            tcb_info_issuer_chain,
            tcb_info: tcb.content.get().to_owned(),
            tcb_info_signature: signature("TCB info", &tcb.signature)?,
            qe_identity_issuer_chain,
            qe_identity: qe.content.get().to_owned(),
            qe_identity_signature: signature("QE identity", &qe.signature)?,
            pck_certificate_chain: None,
        }))
    }

    pub(super) fn inner(&self) -> &QuoteCollateralV3 {
        &self.0
    }
}

fn bounded(actual: usize) -> Result<(), Error> {
    if actual > MAX_COLLATERAL_LEN {
        return Err(Error::CollateralTooLarge { actual, max: MAX_COLLATERAL_LEN });
    }
    Ok(())
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}
