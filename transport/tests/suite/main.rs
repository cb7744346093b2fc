//! Frames that arrive as they were sent or are refused, and links that hold up only the slow.
mod frames;
mod links;
mod samples;
