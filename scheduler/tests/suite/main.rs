//! The scheduler against a made-up world under virtual time, and its single rules one by one.
mod rules;
mod table;
mod world;
