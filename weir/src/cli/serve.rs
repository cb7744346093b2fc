//! `weir serve`
use super::speaker::{device_options, find, start};
use super::{Interrupted, output::note};
use crate::config::Config;
use crate::gateway::{Gateway, GatewayConfig};
use std::io::{Write, stdout};
use std::net::SocketAddr;
use tokio::sync::oneshot;

/// Serve models over the OpenAI API
#[derive(clap::Args)]
#[command(after_help = "\
The address is printed once requests are taken, and nothing else goes to standard output. Off loopback a key is
required. Ctrl-C lets requests that are under way finish.

Examples:
  weir serve
  weir serve --model smollm2-135m --model qwen2.5-coder-0.5b
  WEIR_API_KEY=secret weir serve --http 0.0.0.0:8484
  weir serve --model null                made-up tokens, for load tests")]
pub(super) struct Serve {
    /// Listen here; port 0 takes any free one [default: 127.0.0.1:8484]
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// A catalog name or a path to a .gguf; may be given several times
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    /// Clients must send this key; better set WEIR_API_KEY, which others on this machine don't see
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

impl Serve {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let names = match self.model.as_slice() {
            [] => vec![None],
            named => named.iter().map(|n| Some(n.as_str())).collect(),
        };
        let models = names.into_iter().map(|n| find(config, n)).collect::<anyhow::Result<Vec<_>>>()?;
        let gateway = GatewayConfig {
            api_key: self.key.or_else(|| config.api_key.clone()),
            allowed_hosts: config.allowed_hosts.clone(),
            allowed_origins: config.allowed_origins.clone(),
            ..GatewayConfig::new(self.http.unwrap_or(config.http))
        };
        super::runtime()?.block_on(async {
            let driver = start(models, device_options(config)).await?;
            let gateway = Gateway::bind(driver.clone(), gateway).await?;
            let names: Vec<String> = driver.models().iter().map(|m| m.name.clone()).collect();
            writeln!(stdout(), "http://{}", gateway.address())?;
            note(&format!("Serving {}. Ctrl-C stops.", names.join(", ")));
            let (said, heard) = oneshot::channel();
            gateway
                .run(async {
                    let _ = said.send(asked_to_stop().await);
                })
                .await;
            driver.shutdown().await;
            match heard.await {
                Ok(Asked::Interrupt) => Err(Interrupted.into()),
                _ => Ok(()),
            }
        })
    }
}

/// How we were asked to stop.
enum Asked {
    Interrupt,
    Terminate,
}

async fn asked_to_stop() -> Asked {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            return tokio::select! {
                _ = terminate.recv() => Asked::Terminate,
                _ = tokio::signal::ctrl_c() => Asked::Interrupt,
            };
        }
    }
    let _ = tokio::signal::ctrl_c().await;
    Asked::Interrupt
}
