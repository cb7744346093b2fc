//! What this process tells of itself: metrics for Prometheus and for OpenTelemetry, traces, log lines.
//!
//! [`Telemetry`] is the handle that everybody has: counting is always on and costs a few locked additions a request.
//! Traces and metrics leave (OTLP, protobuf over HTTP) only where an address is configured; then a thread of its own
//! sends them, whatever is more than its queue holds is dropped and counted, and nobody who serves waits for it.
//!
//! A request is one trace. [`Served`] is its part in the gateway (`POST /v1/...`, with the client's `traceparent` as its
//! parent), [`Trail`] the scheduler's (`weir.schedule`, whose events say what was decided) and its attempts' (`chat
//! MODEL`, each a call of a node or a provider), [`Watcher`] a node's (`weir.node`, and `weir.prefill` and `weir.decode`
//! on its device), wherever that node is: the trace context travels in the frame. Spans are made when they end, from
//! what was noted; none is per token, and none holds a word of what was said.
//!
//! All names are in `names`. The wire format is written by hand (`protobuf`): the few messages of OTLP that we send take
//! a page, where the official crates bring a second HTTP client, tonic and a hundred thousand lines.
mod exporter;
mod gather;
mod listen;
mod logs;
mod metrics;
mod names;
mod node;
mod otlp;
mod power;
mod prometheus;
mod protobuf;
mod served;
mod span;
mod trail;

pub use exporter::{ExportConfig, Target};
pub use gather::{gather, gather_node};
pub use listen::{Listener, Scrape};
pub use logs::{LogFormat, about, start as start_logging};
pub use metrics::Family;
pub use names::{Conventions, Operation};
pub use node::Watcher;
pub use prometheus::{CONTENT_TYPE, render};
pub use served::Served;
pub use span::{Sampler, traceparent};
pub use trail::{Trail, Whither, Whose};

use exporter::Exporter;
use metrics::Meters;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Counts, and hands on what is to leave. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Telemetry {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    meters: Meters,
    conventions: Conventions,
    sampler: Sampler,
    exporter: Option<Exporter>,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Telemetry").field("exports", &self.inner.exporter.is_some()).finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Counts alone where `export` is none; else traces and metrics leave, too. Fails, and says why, where the address
    /// makes no sense.
    pub fn new(
        conventions: Conventions,
        sampler: Sampler,
        export: Option<ExportConfig>,
    ) -> Result<Telemetry, String> {
        // From now on.
        _ = gather::began();
        let exporter = export.map(Exporter::start).transpose()?;
        let meters = Meters::new(conventions);
        Ok(Telemetry { inner: Arc::new(Inner { meters, conventions, sampler, exporter }) })
    }

    pub(crate) fn meters(&self) -> &Meters {
        &self.inner.meters
    }

    /// Whether spans are wanted at all.
    pub fn traces(&self) -> bool {
        self.inner.exporter.as_ref().is_some_and(Exporter::takes_spans)
    }

    /// How often metrics are to be sent; none where they aren't.
    pub fn metrics_every(&self) -> Option<Duration> {
        self.inner.exporter.as_ref()?.metrics_every()
    }

    /// Sends metrics, if any leave.
    pub fn send_metrics(&self, families: Vec<Family>) {
        if let Some(exporter) = &self.inner.exporter {
            exporter.metrics(families, SystemTime::now());
        }
    }

    /// Spans and metrics that were dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.inner.exporter.as_ref().map_or(0, Exporter::dropped)
    }

    /// Waits until what was handed over has been sent, or for so long. Blocks.
    pub fn flush(&self, within: Duration) {
        if let Some(exporter) = &self.inner.exporter {
            exporter.flush(within);
        }
    }

    fn send(&self, span: span::Span) {
        if let Some(exporter) = &self.inner.exporter {
            exporter.span(span);
        }
    }
}
