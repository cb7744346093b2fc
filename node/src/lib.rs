//! What a node does: load models ([`Loaded`]), then [`Worker::serve`] a scheduler at the other end of a link. It does so in a
//! browser's worker too, with the engine that is there.
#![forbid(unsafe_code)]

mod caches;
mod clock;
mod holdings;
mod load;
mod meter;
#[cfg(not(target_arch = "wasm32"))]
mod null;
mod tasks;
mod text;
mod trial;
mod watch;
mod worker;

pub use holdings::{Load, Stock};
#[cfg(not(target_arch = "wasm32"))]
pub use load::load;
pub use load::{Loaded, describe};
#[cfg(not(target_arch = "wasm32"))]
pub use null::null;
pub use text::{ModelText, ReadTextError, TEXT_MAX};
pub use watch::{Ran, Watch};
pub use weir_backends::load::{LoadError, LoadOptions};
pub use worker::{Credentials, Hears, Machine, Resident, Schedulers, Worker, WorkerError};
