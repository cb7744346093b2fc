//! Tests of the whole, by real processes.
