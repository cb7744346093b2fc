//! A load tool: HTTP/1.1 clients that ask as fast as they are answered, and a null upstream that answers at once. Threads that
//! block, so that the tool itself costs little.
use anyhow::{Context as _, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// No answer takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a load of requests took.
#[derive(Debug)]
pub struct Load {
    /// Each request's time, ascending.
    pub times: Vec<Duration>,
    /// Of all of them together.
    pub requests_per_s: f64,
}

impl Load {
    /// The time that so many percent of the requests took at most.
    pub fn percentile(&self, percent: usize) -> Duration {
        let at = self.times.len() * percent / 100;
        self.times.get(at.min(self.times.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// `POST path` with a JSON body, on a connection that is kept.
pub fn request(path: &str, body: &str) -> Vec<u8> {
    request_with(path, "", body)
}

/// The same with further headers, each ended by `\r\n`.
pub fn request_with(path: &str, headers: &str, body: &str) -> Vec<u8> {
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{headers}");
    format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Sends `request` `count` times over `connections`, each of which waits for its answer before it asks again; a tenth more
/// goes before and doesn't count.
pub fn run(to: SocketAddr, request: &[u8], connections: usize, count: usize) -> Result<Load> {
    let (each, start) = (count / connections, Barrier::new(connections + 1));
    thread::scope(|scope| {
        let clients: Vec<_> =
            (0..connections).map(|_| scope.spawn(|| client(to, request, each, &start))).collect();
        start.wait();
        let began = Instant::now();
        let mut times = Vec::with_capacity(count);
        for client in clients {
            times.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        let requests_per_s = times.len() as f64 / began.elapsed().as_secs_f64();
        times.sort();
        Ok(Load { times, requests_per_s })
    })
}

fn client(to: SocketAddr, request: &[u8], count: usize, start: &Barrier) -> Result<Vec<Duration>> {
    let mut warm = Ok(());
    let mut connection = connect(to);
    if let Ok(connection) = &mut connection {
        warm = (0..count / 10).try_for_each(|_| exchange(connection, request).map(drop));
    }
    // Whatever happened, the others wait for this one.
    start.wait();
    warm?;
    let mut connection = connection?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        exchange(&mut connection, request)?;
        times.push(began.elapsed());
    }
    Ok(times)
}

/// A connection, read through a buffer.
pub type Connection = BufReader<TcpStream>;

/// Connects.
pub fn connect(to: SocketAddr) -> Result<Connection> {
    let stream = TcpStream::connect(to).with_context(|| format!("nobody answers at {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}

/// Sends a request and reads the answer, which must be 200 and say its length; its body.
pub fn exchange(connection: &mut Connection, request: &[u8]) -> Result<Vec<u8>> {
    connection.get_mut().write_all(request)?;
    let (status, length) = head(connection)?;
    let mut body = vec![0; length.context("the answer doesn't say how long it is")?];
    connection.read_exact(&mut body)?;
    ensure!(status == 200, "status {status}: {}", String::from_utf8_lossy(&body));
    Ok(body)
}

/// The first line's status (0 for a request) and the length of the body, if it says so.
pub fn head(connection: &mut impl BufRead) -> Result<(u16, Option<usize>)> {
    let mut line = String::new();
    ensure!(connection.read_line(&mut line)? > 0, "the connection was closed");
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let mut length = None;
    loop {
        line.clear();
        connection.read_line(&mut line)?;
        match line.trim_end() {
            "" => return Ok((status, length)),
            other => {
                if let Some((name, value)) = other.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    length = Some(value.trim().parse()?);
                }
            }
        }
    }
}

/// Answers every chat request with the same token, at once. It runs as long as the process.
pub fn null_upstream() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("upstream".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // Whoever hangs up ends its thread.
            _ = thread::Builder::new().spawn(move || serve(stream));
        }
    })?;
    Ok(address)
}

fn serve(stream: TcpStream) -> Result<()> {
    const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"null","choices":[{"index":0,"message":{"role":"assistant","content":" t300"},"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":20,"completion_tokens":1,"total_tokens":21}}"#;
    const MODELS: &str =
        r#"{"object":"list","data":[{"id":"null","object":"model","created":1,"owned_by":"bench"}]}"#;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let posted = stream.fill_buf()?.starts_with(b"POST");
        let (_, length) = head(&mut stream)?;
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body)?;
        let answer = if posted { ANSWER } else { MODELS };
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
        let whole = format!("{head}content-length: {}\r\n\r\n{answer}", answer.len());
        stream.get_mut().write_all(whole.as_bytes())?;
    }
}

/// When the tokens of a streamed answer came.
pub fn stream(to: SocketAddr, request: &[u8]) -> Result<Vec<Instant>> {
    let mut connection = connect(to)?;
    connection.get_mut().write_all(request)?;
    let (status, _) = head(&mut connection)?;
    ensure!(status == 200, "status {status}");
    let (mut line, mut times) = (String::new(), Vec::new());
    loop {
        line.clear();
        if connection.read_line(&mut line)? == 0 {
            bail!("the stream ended early");
        }
        match line.strip_prefix("data: ").map(str::trim_end) {
            Some("[DONE]") => return Ok(times),
            Some(data) if data.contains("\"content\":\"") || data.contains("\"text\":\"") => {
                times.push(Instant::now());
            }
            _ => {}
        }
    }
}
