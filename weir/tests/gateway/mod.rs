//! Every route and every error of the gateway.
mod answers;
mod errors;
mod limits;
mod pages;
mod server;
mod tools;
