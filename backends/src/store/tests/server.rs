//! A web server that misbehaves to order.
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How a path answers.
#[derive(Clone, Default)]
pub(super) struct Behaviour {
    pub(super) body: Vec<u8>,
    pub(super) no_ranges: bool,
    pub(super) etag: Option<&'static str>,
    /// Each connection is cut after this many bytes of body.
    pub(super) cut_after: Option<usize>,
    /// Nothing more comes after this many bytes, and the connection stays open.
    pub(super) stall_after: Option<usize>,
    pub(super) redirect: Option<String>,
    pub(super) headers: Vec<(&'static str, String)>,
}

/// One request, as it came.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) path: String,
    pub(super) headers: HashMap<String, String>,
}

pub(super) struct Server {
    pub(super) url: String,
    paths: Arc<Mutex<HashMap<String, Behaviour>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub(super) fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let paths: Arc<Mutex<HashMap<String, Behaviour>>> = Arc::default();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (all, log) = (paths.clone(), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (all, log) = (all.clone(), log.clone());
                std::thread::spawn(move || {
                    let _ = answer(stream, &all, &log);
                });
            }
        });
        Server { url, paths, seen }
    }

    pub(super) fn put(&self, path: &str, behaviour: Behaviour) -> String {
        self.paths.lock().unwrap().insert(path.into(), behaviour);
        format!("{}{path}", self.url)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn answer(
    mut stream: TcpStream,
    paths: &Mutex<HashMap<String, Behaviour>>,
    log: &Mutex<Vec<Seen>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut seen = Seen { path: first.split(' ').nth(1).unwrap_or("/").into(), ..Seen::default() };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        seen.headers.insert(name.to_ascii_lowercase(), value.into());
    }
    log.lock().unwrap().push(seen.clone());
    let Some(b) = paths.lock().unwrap().get(&seen.path).cloned() else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    if let Some(to) = &b.redirect {
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
    }
    let range = seen.headers.get("range").filter(|_| !b.no_ranges);
    let range = range.filter(|_| seen.headers.get("if-range").is_none_or(|e| Some(e.as_str()) == b.etag));
    let from: usize = range.map_or(0, |r| r[6..].trim_end_matches('-').parse().unwrap());
    let total = b.body.len();
    let mut head = match range {
        Some(_) => format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {from}-{}/{total}\r\n",
            total.max(1) - 1
        ),
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    head += &format!("content-length: {}\r\nconnection: close\r\n", total - from);
    if let Some(etag) = b.etag {
        head += &format!("etag: {etag}\r\n");
    }
    for (name, value) in &b.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    let rest = &b.body[from..];
    let sent = b.cut_after.or(b.stall_after).unwrap_or(rest.len()).min(rest.len());
    stream.write_all(&rest[..sent])?;
    stream.flush()?;
    if b.stall_after.is_some() {
        std::thread::sleep(Duration::from_secs(60));
    }
    Ok(())
}
