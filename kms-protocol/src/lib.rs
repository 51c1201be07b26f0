//! The dstack KMS wire protocol: messages, attestation encodings, derivations. No I/O.
