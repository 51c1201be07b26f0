//! The keyferry command.
