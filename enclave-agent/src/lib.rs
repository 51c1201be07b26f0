//! Fetches an enclave's application keys from a dstack KMS.
