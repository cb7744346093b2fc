//! Spans and metrics as OTLP 1.x writes them. The numbers are those of `opentelemetry/proto/*.proto`.
use super::metrics::{Family, Histogram, Kind, Metric, Value};
use super::protobuf::Message;
use super::span::{Attribute, Span};
use std::time::{SystemTime, UNIX_EPOCH};

const SCOPE: &str = "weir";
/// Sums since the process began.
const CUMULATIVE: u64 = 2;
/// Of the span's flags: whether the parent is in another process is known by nobody here.
const FLAGS_MASK: u32 = 0xff;

/// Whose spans and metrics they are.
#[derive(Clone, Debug)]
pub(super) struct Resource(pub Vec<(String, String)>);

/// An `ExportTraceServiceRequest`.
pub(super) fn traces(resource: &Resource, spans: &[Span]) -> Vec<u8> {
    let mut request = Message::default();
    request.message(1, |m| {
        m.message(1, |m| describe(m, resource));
        m.message(2, |m| {
            m.message(1, scope);
            spans.iter().for_each(|span| m.message(2, |m| write_span(m, span)));
        });
    });
    request.into_bytes()
}

/// An `ExportMetricsServiceRequest`.
pub(super) fn metrics(
    resource: &Resource,
    families: &[Family],
    since: SystemTime,
    now: SystemTime,
) -> Vec<u8> {
    let mut request = Message::default();
    request.message(1, |m| {
        m.message(1, |m| describe(m, resource));
        m.message(2, |m| {
            m.message(1, scope);
            for family in families.iter().filter(|family| !family.series.is_empty()) {
                m.message(2, |m| write_family(m, family, nanos(since), nanos(now)));
            }
        });
    });
    request.into_bytes()
}

fn describe(m: &mut Message, resource: &Resource) {
    for (name, value) in &resource.0 {
        m.message(1, |m| text(m, name, value));
    }
}

fn scope(m: &mut Message) {
    m.text(1, SCOPE);
    m.text(2, env!("CARGO_PKG_VERSION"));
}

fn text(m: &mut Message, name: &str, value: &str) {
    m.text(1, name);
    m.message(2, |m| m.text(1, value));
}

fn nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn attribute(m: &mut Message, name: &str, value: &Attribute) {
    m.text(1, name);
    m.message(2, |m| match value {
        Attribute::Text(text) => m.text(1, text),
        Attribute::Bool(bool) => m.varint(2, u64::from(*bool)),
        Attribute::Int(number) => m.int(3, *number),
        Attribute::Float(number) => m.double(4, *number),
        Attribute::Texts(texts) => {
            m.message(5, |m| texts.iter().for_each(|text| m.message(1, |m| m.text(1, text))));
        }
    });
}

fn write_span(m: &mut Message, span: &Span) {
    m.bytes(1, &span.trace.to_be_bytes());
    m.bytes(2, &span.id.to_be_bytes());
    if span.parent != 0 {
        m.bytes(4, &span.parent.to_be_bytes());
    }
    m.text(5, &span.name);
    m.varint(6, span.kind as u64);
    m.fixed64(7, nanos(span.start));
    m.fixed64(8, nanos(span.end.max(span.start)));
    for (name, value) in &span.attributes {
        m.message(9, |m| attribute(m, name, value));
    }
    for event in &span.events {
        m.message(11, |m| {
            m.fixed64(1, nanos(event.at));
            m.text(2, event.name);
            event.attributes.iter().for_each(|(name, value)| m.message(3, |m| attribute(m, name, value)));
        });
    }
    if span.failed {
        m.message(15, |m| m.varint(3, 2));
    }
    m.fixed32(16, u32::from(span.flags) & FLAGS_MASK);
}

fn write_family(m: &mut Message, family: &Family, since: u64, now: u64) {
    let Metric { name, unit, kind, help } = family.metric;
    m.text(1, name);
    m.text(2, help);
    m.text(3, unit);
    let points = |m: &mut Message| {
        for series in &family.series {
            m.message(1, |m| match &series.value {
                Value::Number(value) => {
                    m.fixed64(2, since);
                    m.fixed64(3, now);
                    m.double(4, *value);
                    series.labels.iter().for_each(|(name, value)| m.message(7, |m| text(m, name, value)));
                }
                Value::Histogram(histogram) => {
                    series.labels.iter().for_each(|(name, value)| m.message(9, |m| text(m, name, value)));
                    write_histogram(m, histogram, since, now);
                }
            });
        }
    };
    match kind {
        Kind::Gauge => m.message(5, points),
        Kind::Counter => m.message(7, |m| {
            points(m);
            m.varint(2, CUMULATIVE);
            m.varint(3, 1);
        }),
        Kind::Histogram(_) => m.message(9, |m| {
            points(m);
            m.varint(2, CUMULATIVE);
        }),
    }
}

fn write_histogram(m: &mut Message, histogram: &Histogram, since: u64, now: u64) {
    m.fixed64(2, since);
    m.fixed64(3, now);
    m.fixed64(4, histogram.count());
    m.double(5, histogram.sum);
    m.packed64(6, histogram.counts.iter().copied());
    m.packed64(7, histogram.bounds.iter().map(|bound| bound.to_bits()));
}
