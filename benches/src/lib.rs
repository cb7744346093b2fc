//! Benches and the comparison with peers.
