//! The scheduler against a made-up world under virtual time, and its single rules one by one.
mod random;
mod rules;
mod samples;
mod table;
mod world;
