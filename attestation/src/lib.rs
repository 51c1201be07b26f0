//! NSM attestation documents: decode, verify, appraise. No I/O, no clock.
