//! A Nitro Security Module in software that signs under a local root.
