//! From what a KMS knows about who asks to what the contracts are asked.

use alloy::primitives::{Address, B256};
use kms_protocol::wire::webhook::BootInfo;

use crate::abi::AppBootInfo;
use crate::{Error, Result};

/// Longest status text and longest list of advisories passed on, in bytes and entries. The published authorisation
/// service has the same limits (its request schema); without them a peer chooses the size of our calls.
const MAX_TCB_STATUS: usize = 128;
const MAX_ADVISORIES: usize = 128;
const MAX_ADVISORY: usize = 256;

/// The contracts' tuple for `info`. Shorter byte fields are padded with zeros on the left, as the published
/// authorisation service does, so that both give the same answers.
///
/// # Errors
/// [`Error::BootInfo`] when a field is longer than its place in the tuple.
pub fn app_boot_info(info: &BootInfo) -> Result<AppBootInfo> {
    within("tcbStatus", info.tcb_status.len(), MAX_TCB_STATUS)?;
    within("advisoryIds", info.advisory_ids.len(), MAX_ADVISORIES)?;
    for advisory in &info.advisory_ids {
        within("advisoryIds", advisory.len(), MAX_ADVISORY)?;
    }
    Ok(AppBootInfo {
        appId: address("appId", &info.app_id)?,
        composeHash: word("composeHash", &info.compose_hash)?,
        instanceId: address("instanceId", &info.instance_id)?,
        deviceId: word("deviceId", &info.device_id)?,
        mrAggregated: word("mrAggregated", &info.mr_aggregated)?,
        mrSystem: word("mrSystem", &info.mr_system)?,
        osImageHash: word("osImageHash", &info.os_image_hash)?,
        tcbStatus: info.tcb_status.clone(),
        advisoryIds: info.advisory_ids.clone(),
    })
}

/// A boot info from its JSON form (the body of the authorisation webhook).
///
/// # Errors
/// [`Error::BootInfo`] naming the field that is missing or malformed.
pub fn from_json(text: &[u8]) -> Result<BootInfo> {
    BootInfo::from_json(text).map_err(|error| problem(error.field, error.problem))
}

fn word(field: &'static str, bytes: &[u8]) -> Result<B256> {
    within(field, bytes.len(), 32)?;
    Ok(B256::left_padding_from(bytes))
}

fn address(field: &'static str, bytes: &[u8]) -> Result<Address> {
    within(field, bytes.len(), 20)?;
    Ok(Address::left_padding_from(bytes))
}

fn within(field: &'static str, actual: usize, limit: usize) -> Result<()> {
    match actual <= limit {
        true => Ok(()),
        false => Err(problem(field, format!("{actual} long, at most {limit} fit"))),
    }
}

fn problem(field: &'static str, problem: impl Into<String>) -> Error {
    Error::BootInfo { field, problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nitro() -> BootInfo {
        BootInfo {
            app_id: vec![0x11; 20],
            os_image_hash: vec![0x7f; 32],
            compose_hash: vec![0x7f; 32],
            mr_aggregated: vec![0x7f; 32],
            mr_system: vec![0x7f; 32],
            device_id: vec![0xde; 32],
            ..BootInfo::default()
        }
    }

    #[test]
    fn short_fields_are_padded_on_the_left() {
        let mut info = nitro();
        info.app_id = vec![1];
        info.mr_system = vec![2, 3];
        let tuple = app_boot_info(&info).unwrap();
        assert_eq!(tuple.appId.to_string(), "0x0000000000000000000000000000000000000001");
        assert_eq!(tuple.mrSystem[30..], [2, 3]);
        assert_eq!(tuple.instanceId, Address::ZERO);
    }

    #[test]
    fn fields_that_do_not_fit_are_refused_by_name() {
        let mut info = nitro();
        info.app_id = vec![0; 21];
        assert_eq!(
            app_boot_info(&info).unwrap_err().to_string(),
            "boot info field appId: 21 long, at most 20 fit"
        );
        let mut info = nitro();
        info.advisory_ids = vec![String::new(); MAX_ADVISORIES + 1];
        assert!(app_boot_info(&info).unwrap_err().to_string().contains("advisoryIds"));
        let mut info = nitro();
        info.tcb_status = "x".repeat(MAX_TCB_STATUS + 1);
        assert!(app_boot_info(&info).unwrap_err().to_string().contains("tcbStatus"));
    }

    #[test]
    fn the_webhook_body_is_read_back() {
        let info = nitro();
        let body = info.to_json(kms_protocol::wire::webhook::BootInfoKeys::TeeVariant);
        assert_eq!(from_json(&body).unwrap(), info);
    }

    #[test]
    fn a_missing_field_is_named() {
        let error = from_json(br#"{"mrAggregated":"00"}"#).unwrap_err();
        assert_eq!(error.to_string(), "boot info field osImageHash: missing, expected a hex string");
    }
}
