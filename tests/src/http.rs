//! As much of an HTTP client as the tests need.
use serde_json::Value;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A response.
#[derive(Debug)]
pub struct Reply {
    /// 0 where there was none.
    pub status: u16,
    /// The body as it came, chunk sizes included.
    pub body: String,
}

impl Reply {
    /// The body.
    ///
    /// # Panics
    /// If it isn't JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }
}

/// One request under way.
pub struct Connection(TcpStream);

impl Connection {
    /// Sends a request.
    pub fn open(address: SocketAddr, method: &str, path: &str, body: &str) -> io::Result<Connection> {
        Connection::open_as(address, method, path, body, "")
    }

    /// The same with further headers, each ended by `\r\n`; a host among them replaces ours.
    pub fn open_as(
        address: SocketAddr,
        method: &str,
        path: &str,
        body: &str,
        headers: &str,
    ) -> io::Result<Connection> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let length = body.len();
        let host = if headers.starts_with("host:") { "" } else { "host: localhost\r\n" };
        let head = format!("{method} {path} HTTP/1.1\r\n{host}{headers}connection: close\r\n");
        let content = format!("content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(format!("{head}{content}").as_bytes())?;
        Ok(Connection(stream))
    }

    /// Waits for the next bytes.
    pub fn some(&mut self) -> io::Result<String> {
        let mut bytes = [0; 4096];
        let length = self.0.read(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
    }

    /// Reads until the server closes.
    pub fn rest(mut self) -> io::Result<String> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The whole response.
    pub fn reply(self) -> io::Result<Reply> {
        let text = self.rest()?;
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Ok(Reply { status, body: body.to_owned() })
    }
}
