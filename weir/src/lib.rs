//! The `weir` program as a library: configuration, the driver that owns the scheduler, the HTTP gateway, the CLI.
#![forbid(unsafe_code)]

pub mod driver;
