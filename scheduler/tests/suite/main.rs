//! The scheduler against a made-up world under virtual time, and its single rules one by one.
mod member;
mod money;
mod others;
mod random;
mod residency;
mod rules;
mod samples;
mod table;
mod world;
