//! The enclave's only way out: an allow-listing CONNECT proxy on the parent.
