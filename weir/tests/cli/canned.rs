//! A server that gives one answer, whatever it is asked.
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

pub(super) struct Canned {
    pub(super) url: String,
    asked: Receiver<Value>,
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

fn event(text: &str, finish: Option<&str>) -> String {
    let choice = json!({ "index": 0, "delta": { "content": text }, "finish_reason": finish });
    format!("data: {}\n\n", json!({ "model": "m", "choices": [choice] }))
}

impl Canned {
    pub(super) fn answering(texts: &[&str]) -> Canned {
        let mut body: String = texts.iter().map(|t| event(t, None)).collect();
        body += &event("", Some("stop"));
        body += "data: [DONE]\n\n";
        Canned::start(move |stream| stream.write_all(format!("{HEAD}{body}").as_bytes()))
    }

    pub(super) fn breaking_off(text: &str) -> Canned {
        let body = event(text, None);
        Canned::start(move |stream| stream.write_all(format!("{HEAD}{body}").as_bytes()))
    }

    pub(super) fn endless(text: &str) -> Canned {
        let body = event(text, None);
        Canned::start(move |stream| {
            stream.write_all(HEAD.as_bytes())?;
            loop {
                stream.write_all(body.as_bytes())?;
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    }

    fn start(answer: impl Fn(&mut TcpStream) -> std::io::Result<()> + Send + 'static) -> Canned {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (sender, asked) = channel();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                if let Some(body) = read_request(&stream) {
                    let _ = sender.send(body);
                }
                // a client that goes away is what some tests are about
                let _ = answer(&mut stream);
            }
        });
        Canned { url, asked }
    }

    /// The body of the next request.
    pub(super) fn asked(&self) -> Value {
        self.asked.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    pub(super) fn wait_until_asked(&self) {
        self.asked();
    }
}

fn read_request(stream: &TcpStream) -> Option<Value> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    serde_json::from_slice(&body).ok()
}
