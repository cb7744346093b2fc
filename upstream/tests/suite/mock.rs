//! A provider that misbehaves to order.
use serde_json::{Value, json};
use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// One request, as it came.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Value,
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ending {
    Proper,
    /// It is whole, and the connection is closed behind it, which nothing announced.
    Closed,
    /// The connection is closed in the middle.
    Cut,
    /// Nothing more comes.
    Hang,
}

/// How a request is answered.
#[derive(Clone, Debug)]
pub struct Script {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    /// Before the head.
    pub pause: Duration,
    /// Nothing at all comes, not even a head; the connection ends as `ending` says.
    pub dead: bool,
    /// Each behind a pause.
    pub pieces: Vec<(Duration, Vec<u8>)>,
    pub ending: Ending,
}

impl Script {
    pub fn new(status: u16, kind: &str, body: &str) -> Script {
        Script {
            status,
            headers: vec![("content-type", kind.to_owned())],
            pause: Duration::ZERO,
            dead: false,
            pieces: vec![(Duration::ZERO, body.as_bytes().to_vec())],
            ending: Ending::Proper,
        }
    }

    pub fn error(status: u16, message: &str) -> Script {
        let body = json!({ "error": { "message": message, "type": "mock", "code": null } });
        Script::new(status, "application/json", &body.to_string())
    }

    /// Server-sent events of these data.
    pub fn events(data: &[String]) -> Script {
        let pieces = data.iter().map(|d| (Duration::ZERO, format!("data: {d}\n\n").into_bytes())).collect();
        Script { pieces, ..Script::new(200, "text/event-stream; charset=utf-8", "") }
    }

    /// OpenAI's chunks of these texts, and usage: 10 tokens of prompt, one for each text.
    pub fn chat(texts: &[&str]) -> Script {
        let mut data: Vec<String> =
            texts.iter().map(|text| chunk(&json!({ "content": text }), None)).collect();
        data.push(chunk(&json!({}), Some("stop")));
        let usage = json!({ "prompt_tokens": 10, "completion_tokens": texts.len() });
        data.push(json!({ "object": "chat.completion.chunk", "choices": [], "usage": usage }).to_string());
        data.push("[DONE]".into());
        Script::events(&data)
    }

    /// A pause before each piece.
    pub fn slow(mut self, pause: Duration) -> Script {
        self.pieces.iter_mut().for_each(|piece| piece.0 = pause);
        self
    }

    /// Only so many pieces, and then that.
    pub fn broken_after(mut self, pieces: usize, ending: Ending) -> Script {
        self.pieces.truncate(pieces);
        Script { ending, ..self }
    }
}

/// One chunk of OpenAI's.
pub fn chunk(delta: &Value, finish: Option<&str>) -> String {
    let choice = json!({ "index": 0, "delta": delta, "finish_reason": finish });
    json!({ "id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice] }).to_string()
}

/// Answers by its scripts, the first for the first request; the last one again and again.
pub struct Mock {
    pub url: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    scripts: Mutex<VecDeque<Script>>,
    paths: Mutex<HashMap<String, Script>>,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    left: AtomicUsize,
}

impl Mock {
    pub fn start(scripts: Vec<Script>) -> Mock {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State { scripts: Mutex::new(scripts.into()), ..State::default() });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                state.connections.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || while let Ok(true) = answer(&stream, &state) {});
            }
        });
        Mock { url, state }
    }

    /// What a GET of this path is answered.
    pub fn put(&self, path: &str, script: Script) {
        self.state.paths.lock().unwrap().insert(path.into(), script);
    }

    /// The POSTs so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Clients that went away before their answer's end.
    pub fn left(&self) -> usize {
        self.state.left.load(Ordering::SeqCst)
    }
}

/// Answers one request; says whether another may follow.
fn answer(stream: &TcpStream, state: &State) -> std::io::Result<bool> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(false);
    }
    let (method, path) =
        line.split_once(' ').map(|(m, rest)| (m.to_owned(), rest.to_owned())).unwrap_or_default();
    let mut seen = Seen { path: path.split(' ').next().unwrap_or("/").into(), ..Seen::default() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        seen.headers.insert(name.to_ascii_lowercase(), value.into());
    }
    let length = seen.headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    seen.body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let script = if method == "GET" {
        let script = state.paths.lock().unwrap().get(&seen.path).cloned();
        script.unwrap_or_else(|| Script::error(404, "no such path"))
    } else {
        state.seen.lock().unwrap().push(seen);
        let mut scripts = state.scripts.lock().unwrap();
        let last = scripts.len() <= 1;
        let script = if last { scripts.front().cloned() } else { scripts.pop_front() };
        script.unwrap_or_else(|| Script::error(500, "no script"))
    };
    let played = play(stream, &script);
    if played.is_err() {
        state.left.fetch_add(1, Ordering::SeqCst);
    }
    played
}

fn play(mut stream: &TcpStream, script: &Script) -> std::io::Result<bool> {
    std::thread::sleep(script.pause);
    if script.dead {
        if script.ending == Ending::Cut {
            stream.shutdown(std::net::Shutdown::Both)?;
            return Ok(false);
        }
        return wait_for_end(stream);
    }
    let mut head = format!("HTTP/1.1 {} Mock\r\ntransfer-encoding: chunked\r\n", script.status);
    for (name, value) in &script.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    for (pause, piece) in script.pieces.iter().filter(|(_, piece)| !piece.is_empty()) {
        if !pause.is_zero() {
            std::thread::sleep(*pause);
        }
        let mut chunk = format!("{:x}\r\n", piece.len()).into_bytes();
        chunk.extend_from_slice(piece);
        chunk.extend_from_slice(b"\r\n");
        stream.write_all(&chunk)?;
    }
    match script.ending {
        Ending::Proper => stream.write_all(b"0\r\n\r\n").map(|()| true),
        Ending::Closed => {
            stream.write_all(b"0\r\n\r\n")?;
            stream.shutdown(std::net::Shutdown::Both)?;
            Ok(false)
        }
        Ending::Cut => {
            stream.shutdown(std::net::Shutdown::Both)?;
            Ok(false)
        }
        Ending::Hang => wait_for_end(stream),
    }
}

/// Until the client goes away, or for a minute.
fn wait_for_end(mut stream: &TcpStream) -> std::io::Result<bool> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let read = stream.read(&mut [0; 1]);
    Err(std::io::Error::other(format!("the client left: {read:?}")))
}
