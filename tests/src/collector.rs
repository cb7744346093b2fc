//! A collector of OpenTelemetry's: takes OTLP over HTTP, and keeps what it got.
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A span as it arrived.
#[derive(Clone, Debug, Default)]
pub struct Span {
    /// In hexadecimal.
    pub trace: String,
    /// In hexadecimal.
    pub id: String,
    /// In hexadecimal; empty where there is none.
    pub parent: String,
    /// What it is called.
    pub name: String,
    /// 1 internal, 2 server, 3 client.
    pub kind: u64,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
    /// As text.
    pub attributes: BTreeMap<String, String>,
    /// Their names, in order.
    pub events: Vec<String>,
    /// It went wrong.
    pub failed: bool,
    /// Of whoever sent it.
    pub resource: BTreeMap<String, String>,
}

#[derive(Default)]
struct Got {
    bodies: Vec<(String, Vec<u8>)>,
    spans: Vec<Span>,
}

/// Listens until the process ends.
pub struct Collector {
    /// `http://HOST:PORT`.
    pub url: String,
    got: Arc<Mutex<Got>>,
}

impl Collector {
    /// Starts one on a free port.
    ///
    /// # Panics
    /// Where there is none.
    pub fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it has an address"));
        let got = Arc::new(Mutex::new(Got::default()));
        let shared = got.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let got = shared.clone();
                std::thread::spawn(move || while take(&stream, &got).is_some() {});
            }
        });
        Collector { url, got }
    }

    /// The environment that has a process send to it, soon.
    pub fn environment(&self) -> [(&'static str, &str); 3] {
        [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.url.as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "300"),
        ]
    }

    /// All spans of a trace, once there are so many.
    ///
    /// # Panics
    /// If they don't come within 20 seconds.
    pub fn trace(&self, trace: &str, count: usize) -> Vec<Span> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let all = self.got.lock().expect("nobody panics with it").spans.clone();
            let spans: Vec<Span> = all.into_iter().filter(|span| span.trace == trace).collect();
            if spans.len() >= count {
                return spans;
            }
            assert!(Instant::now() < end, "{count} spans were to come: {spans:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The bodies that came to a path.
    pub fn bodies(&self, path: &str) -> Vec<Vec<u8>> {
        let got = self.got.lock().expect("nobody panics with it");
        got.bodies.iter().filter(|(at, _)| at == path).map(|(_, body)| body.clone()).collect()
    }
}

/// Reads one request and answers it; none when there is no more.
fn take(stream: &TcpStream, got: &Mutex<Got>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut length, mut kind) = (0, String::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "content-type" => kind = value.trim().to_owned(),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let spans = if path == "/v1/traces" { spans(&body) } else { Vec::new() };
    let is_good = kind == "application/x-protobuf";
    let mut kept = got.lock().expect("nobody panics with it");
    kept.spans.extend(spans);
    kept.bodies.push((path, body));
    drop(kept);
    let status = if is_good { "200 OK" } else { "415 Unsupported Media Type" };
    let mut stream = stream;
    stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes()).ok()
}

/// A field of a message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message.
///
/// # Panics
/// Where it is none.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    fn number(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let (first, rest) = bytes.split_first().expect("a number ends");
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            shift += 7;
            if first & 0x80 == 0 {
                return value;
            }
        }
    }
    fn some<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (head, rest) = bytes.split_at(length);
        *bytes = rest;
        head
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = number(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(number(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(some(&mut bytes, 8).try_into().expect("8 bytes"))),
            5 => Field::Number(u32::from_le_bytes(some(&mut bytes, 4).try_into().expect("4 bytes")).into()),
            2 => {
                let length = number(&mut bytes) as usize;
                Field::Bytes(some(&mut bytes, length))
            }
            other => panic!("wire type {other}"),
        };
        found.push((tag >> 3, field));
    }
    found
}

fn messages(bytes: &[u8], wanted: u64) -> Vec<&[u8]> {
    let of = |(number, field)| match field {
        Field::Bytes(bytes) if number == wanted => Some(bytes),
        _ => None,
    };
    fields(bytes).into_iter().filter_map(of).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text is UTF-8")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A `KeyValue`.
fn pair(bytes: &[u8]) -> (String, String) {
    let (mut name, mut value) = (String::new(), String::new());
    for (number, field) in fields(bytes) {
        match (number, field) {
            (1, Field::Bytes(bytes)) => name = text(bytes),
            (2, Field::Bytes(bytes)) => value = any(bytes),
            _ => panic!("a pair has two fields"),
        }
    }
    (name, value)
}

/// An `AnyValue`.
fn any(bytes: &[u8]) -> String {
    match fields(bytes).into_iter().next() {
        Some((1, Field::Bytes(bytes))) => text(bytes),
        Some((2, Field::Number(bool))) => (bool != 0).to_string(),
        Some((3, Field::Number(number))) => (number as i64).to_string(),
        Some((4, Field::Number(bits))) => f64::from_bits(bits).to_string(),
        Some((5, Field::Bytes(bytes))) => {
            messages(bytes, 1).into_iter().map(any).collect::<Vec<_>>().join(",")
        }
        _ => panic!("no value"),
    }
}

/// The spans of an `ExportTraceServiceRequest`.
fn spans(body: &[u8]) -> Vec<Span> {
    let mut all = Vec::new();
    for of in messages(body, 1) {
        let resource: BTreeMap<_, _> =
            messages(of, 1).into_iter().flat_map(|r| messages(r, 1)).map(pair).collect();
        for scope in messages(of, 2) {
            all.extend(messages(scope, 2).into_iter().map(|bytes| span(bytes, &resource)));
        }
    }
    all
}

fn span(bytes: &[u8], resource: &BTreeMap<String, String>) -> Span {
    let mut span = Span { resource: resource.clone(), ..Span::default() };
    for (number, field) in fields(bytes) {
        match (number, field) {
            (1, Field::Bytes(bytes)) => span.trace = hex(bytes),
            (2, Field::Bytes(bytes)) => span.id = hex(bytes),
            (4, Field::Bytes(bytes)) => span.parent = hex(bytes),
            (5, Field::Bytes(bytes)) => span.name = text(bytes),
            (6, Field::Number(kind)) => span.kind = kind,
            (7, Field::Number(at)) => span.start = at,
            (8, Field::Number(at)) => span.end = at,
            (9, Field::Bytes(bytes)) => {
                let (name, value) = pair(bytes);
                span.attributes.insert(name, value);
            }
            (11, Field::Bytes(bytes)) => span.events.extend(messages(bytes, 2).into_iter().map(text)),
            (15, Field::Bytes(bytes)) => {
                span.failed = fields(bytes).iter().any(|f| matches!(f, (3, Field::Number(2))));
            }
            (16, Field::Number(_)) => {}
            (other, _) => panic!("field {other} of a span"),
        }
    }
    span
}
