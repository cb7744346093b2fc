//! Frames that arrive as they were sent or are refused, and links that hold up only the slow.
#![allow(clippy::unwrap_used)] // a test that panics has failed
mod frames;
mod links;
mod samples;
