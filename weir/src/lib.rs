//! The `weir` program as a library: configuration, the driver that owns the scheduler, the HTTP gateway, the CLI.
#![forbid(unsafe_code)]

pub mod authority;
pub mod books;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod driver;
pub mod etcd;
pub mod gateway;
pub mod keys;
mod lan;
mod once;
pub mod policy;
mod private;
pub mod replicas;
pub mod state;
pub mod telemetry;
