//! A gateway over the null model, and a client that sends exactly the bytes it is told to.
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use weir::driver::{Driver, DriverConfig, ModelSpec};
use weir::gateway::{Gateway, GatewayConfig};

pub struct Server {
    pub address: SocketAddr,
    pub driver: Driver,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start() -> Server {
        Server::with(|_| ()).await
    }

    pub async fn with(change: impl FnOnce(&mut GatewayConfig)) -> Server {
        // slow enough that a long answer can be interrupted
        Server::paced("null:step_us=100", change).await
    }

    pub async fn paced(null: &str, change: impl FnOnce(&mut GatewayConfig)) -> Server {
        let null = ModelSpec::parse_null(null).expect("its own name").expect("a pace");
        let config = DriverConfig { models: vec![null], ..DriverConfig::default() };
        let driver = Driver::start(config).await.expect("the null model needs nothing");
        let mut config = GatewayConfig::new("127.0.0.1:0".parse().unwrap());
        change(&mut config);
        let gateway = Gateway::bind(driver.clone(), config).await.expect("a free port");
        let address = gateway.address();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(gateway.run(async move {
            let _ = stopped.await;
        }));
        Server { address, driver, stop: Some(stop), task }
    }

    /// Tells the gateway to end.
    pub fn stop(&mut self) {
        self.stop.take().map(|s| s.send(()));
    }

    /// Waits for its end.
    pub async fn ended(self) {
        tokio::time::timeout(Duration::from_secs(10), self.task).await.expect("it ends in time").unwrap();
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", b"").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, "content-type: application/json\r\n", body.to_string().as_bytes()).await
    }

    pub async fn chat(&self, body: &Value) -> Reply {
        self.post("/v1/chat/completions", body).await
    }

    pub async fn complete(&self, body: &Value) -> Reply {
        self.post("/v1/completions", body).await
    }

    /// `headers` end in `\r\n` each; a Host is added where they have none.
    pub async fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        let host = if headers.to_lowercase().contains("host:") { "" } else { "host: localhost\r\n" };
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\n{host}connection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        let mut stream = self.connect().await;
        stream.write_all(head.as_bytes()).await.unwrap();
        // A server that has seen enough may close before it has read all.
        let _ = stream.write_all(body).await;
        read_reply(&mut stream).await
    }
}

/// A response, its body put together.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    /// Lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    }

    /// The JSON of the events, checked to end in `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{self:?}");
        let mut events = self.partial_events();
        assert_eq!(events.pop(), Some(Value::from("[DONE]")), "{self:?}");
        events
    }

    pub fn partial_events(&self) -> Vec<Value> {
        let data = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        data.map(|d| if d == "[DONE]" { Value::from(d) } else { serde_json::from_str(d).expect(d) }).collect()
    }

    pub fn error(&self) -> (u16, String, String) {
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{self:?}");
        assert!(error["type"].is_string(), "{self:?}");
        let text = |v: &Value| v.as_str().unwrap_or("").to_owned();
        (self.status, text(&error["code"]), text(&error["param"]))
    }
}

/// Reads until the server closes.
pub async fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut bytes)).await;
    let _ = read.expect("the server closes in time");
    parse_reply(&bytes)
}

fn parse_reply(bytes: &[u8]) -> Reply {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let head = head.to_lowercase();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let body = match head.contains("transfer-encoding: chunked") {
        true => joined_chunks(body),
        false => body.to_owned(),
    };
    Reply { status, head, body }
}

fn joined_chunks(mut rest: &str) -> String {
    let mut out = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&after[..size.min(after.len())]);
        rest = after.get(size + 2..).unwrap_or("");
    }
    out
}
