//! RA-TLS client and server configurations for rustls.
