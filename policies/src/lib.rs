//! The routing-policy language: TOML files with CEL expressions, which say where requests may go and where they had better.
//!
//! [`Rules::parse`] reads and checks a file; the result is a [`weir_scheduler::Policy`]. [`Table`] is a file of requests
//! and where they are expected to go, [`explain`] says why. Nothing here does I/O.
#![forbid(unsafe_code)]

mod budget;
mod compile;
mod eval;
mod explain;
mod fields;
mod file;
mod judge;
mod near;
mod place;
mod pool;
mod schema;
mod shipped;
mod syntax;
mod table;
mod value;

#[cfg(test)]
#[path = "../tests/suite/random.rs"]
mod random;
#[cfg(test)]
mod reference;

pub use budget::{Allowance, Who};
pub use explain::{Explanation, Outcome, Verdict, explain};
pub use fields::vocabulary;
pub use file::{Objective, Rules};
pub use place::{Problem, Problems};
pub use pool::{PoolFile, RequestFile};
pub use schema::schema;
pub use shipped::{SHIPPED, Shipped, shipped};
pub use table::{Case, Mismatch, Table};
