//! Reproducible enclave images and their measurements.
