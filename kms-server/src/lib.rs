//! A KMS that interoperates with dstack-kms.
