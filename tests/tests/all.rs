//! Tests of the whole, by real processes.
#![allow(clippy::unwrap_used)] // a test that panics has failed
#[path = "whole/bench.rs"]
mod bench;
#[path = "whole/cluster.rs"]
mod cluster;
#[path = "whole/footprint.rs"]
mod footprint;
#[path = "whole/keys.rs"]
mod keys;
#[path = "whole/lan.rs"]
mod lan;
#[path = "whole/llmock.rs"]
mod llmock;
#[path = "../../upstream/tests/suite/mock.rs"]
#[expect(dead_code, reason = "the provider's own tests use all of it")]
mod mock;
#[path = "whole/replicas.rs"]
mod replicas;
#[path = "whole/residency.rs"]
mod residency;
#[path = "whole/sdk.rs"]
mod sdk;
#[path = "whole/serve.rs"]
mod serve;
#[path = "whole/spill.rs"]
mod spill;
#[path = "whole/strangers.rs"]
mod strangers;
#[path = "whole/telemetry.rs"]
mod telemetry;
#[path = "whole/tls.rs"]
mod tls;
