//! What a node does: [`load`] models, then [`Worker::serve`] a scheduler at the other end of a link.
#![forbid(unsafe_code)]

mod caches;
mod holdings;
mod load;
mod meter;
mod null;
mod text;
mod trial;
mod worker;

pub use holdings::{Load, Stock};
pub use load::{Loaded, load};
pub use null::null;
pub use text::{ModelText, ReadTextError, TEXT_MAX};
pub use weir_backends::load::{LoadError, LoadOptions};
pub use worker::{Credentials, Machine, Resident, Worker, WorkerError};
