//! Every route and every error of the gateway.
mod answers;
mod errors;
mod limits;
mod messages;
mod pages;
mod providers;
mod responses;
mod server;
mod tools;
