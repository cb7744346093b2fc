//! What the gateway adds to a request: `cargo bench -p weir --bench gateway`.
//!
//! The same request of one token goes to the null model, whose steps cost nothing, once through the driver and once
//! over HTTP, from 1 and from 64 clients at once. The clients are in this process, so their own work counts too: what is
//! printed is an upper bound.
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use weir::driver::{Ask, Driver, DriverConfig, ModelSpec};
use weir::gateway::{Gateway, GatewayConfig};
use weir_backends::null::NULL_MODEL;
use weir_scheduler::Sampling;

/// Requests of all clients together, after as many tenths that don't count.
const REQUESTS: usize = 20_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = DriverConfig { models: vec![ModelSpec::null()], ..DriverConfig::default() };
    let driver = Driver::start(config).await?;
    let mut config = GatewayConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    config.limits.requests_max = 256;
    let gateway = Gateway::bind(driver.clone(), config).await?;
    let address = gateway.address();
    let serving = tokio::spawn(gateway.run(std::future::pending()));
    println!(
        "{:<12}{:>14}{:>14}{:>14}{:>14}{:>14}{:>14}",
        "CLIENTS", "DRIVER p50", "p99", "HTTP p50", "p99", "ADDED p50", "p99"
    );
    for clients in [1, 64] {
        let direct = measure(clients, async |_| Ok(Through::Driver(driver.clone()))).await?;
        let http = measure(clients, async |_| Ok(Through::Http(TcpStream::connect(address).await?))).await?;
        let [p50, p99] = [50, 99].map(|p| (percentile(&direct, p), percentile(&http, p)));
        let shown = [p50.0, p99.0, p50.1, p99.1, p50.1.saturating_sub(p50.0), p99.1.saturating_sub(p99.0)];
        let shown: String = shown.iter().map(|d| format!("{:>11.0} us", d.as_secs_f64() * 1e6)).collect();
        println!("{clients:<12}{shown}");
    }
    serving.abort();
    driver.shutdown().await;
    Ok(())
}

/// How a client asks.
enum Through {
    Driver(Driver),
    Http(TcpStream),
}

/// All requests' times, ascending.
async fn measure(
    clients: usize,
    client: impl AsyncFn(usize) -> anyhow::Result<Through>,
) -> anyhow::Result<Vec<Duration>> {
    let mut tasks = JoinSet::new();
    for number in 0..clients {
        let mut through = client(number).await?;
        tasks.spawn(async move {
            let each = REQUESTS / clients;
            let mut times = Vec::with_capacity(each);
            for request in 0..each + each / 10 {
                let start = Instant::now();
                through.ask().await?;
                if request >= each / 10 {
                    times.push(start.elapsed());
                }
            }
            anyhow::Ok(times)
        });
    }
    let mut all = Vec::with_capacity(REQUESTS);
    for times in tasks.join_all().await {
        all.extend(times?);
    }
    all.sort();
    Ok(all)
}

fn percentile(times: &[Duration], p: usize) -> Duration {
    times.get(times.len() * p / 100).copied().unwrap_or_default()
}

impl Through {
    async fn ask(&mut self) -> anyhow::Result<()> {
        match self {
            Through::Driver(driver) => {
                let mut generation = driver.generate(ask()).await.map_err(|f| anyhow::anyhow!(f.message))?;
                while generation.events.recv().await.is_some() {}
                Ok(())
            }
            Through::Http(socket) => over_http(socket).await,
        }
    }
}

async fn over_http(socket: &mut TcpStream) -> anyhow::Result<()> {
    let body = r#"{"model":"null","prompt":"Hello, world","max_tokens":1,"ignore_eos":true}"#;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(request.as_bytes()).await?;
    let mut reply = Vec::with_capacity(1024);
    loop {
        anyhow::ensure!(socket.read_buf(&mut reply).await? > 0, "the gateway hung up");
        let text = std::str::from_utf8(&reply)?;
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "{text}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if length.is_some_and(|length| length.parse() == Ok(body.len())) {
            return Ok(());
        }
    }
}

fn ask() -> Ask {
    let prompt = "Hello, world".bytes().map(|byte| u32::from(byte) + 1).collect();
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    Ask { sampling, ignore_eos: true, ..Ask::new(NULL_MODEL, prompt, 1) }
}
