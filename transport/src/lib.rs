//! One endpoint type for vsock, Unix and TCP sockets; every connect and accept has a deadline.
