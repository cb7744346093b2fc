//! Configuration in layers: defaults, `weir.toml`, `WEIR_*` environment, flags. The only place that reads the environment.
mod telemetry;

use crate::driver::DeviceChoice;
use crate::etcd::EtcdConfig;
use crate::telemetry::{Conventions, LogFormat};
use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use weir_backends::store::{StoreConfig, StoreError};
use weir_scheduler::{LABEL_BYTES_MAX, LABELS_MAX, Price};
use weir_upstream::{
    Auth, Catalog, CatalogError, Entry, Provider, Secret, Times, Upstream, UpstreamError, Whose,
};

/// What can be set in `weir.toml`, and by `WEIR_` and the upper-case name in the environment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The model that is meant where none is named: a catalog name or a path to a .gguf.
    pub model: Option<String>,
    /// A smaller model of the same tokenizer that guesses for that one.
    pub draft: Option<String>,
    /// Where the gateway listens.
    pub http: SocketAddr,
    /// The key that clients of the gateway must send.
    pub api_key: Option<String>,
    /// The gateway's certificate (PEM); off loopback a local authority makes one where there is none.
    pub tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM).
    pub tls_key: Option<PathBuf>,
    /// Plain HTTP even off loopback, where something in front does TLS.
    pub insecure_http: bool,
    /// Names, besides this machine's own, by which clients may call the gateway.
    pub allowed_hosts: Vec<String>,
    /// Origins of web pages that may call the gateway from a browser.
    pub allowed_origins: Vec<String>,
    /// A gateway that `weir chat` asks instead of running a model here.
    pub url: Option<String>,
    /// The key for it.
    pub key: Option<String>,
    /// What computes: `auto` (an NVIDIA GPU if one can be used, else the processor), `cpu`, `cuda`, `cuda:1`, `wgpu`.
    pub device: DeviceChoice,
    /// Threads that compute; one a processor where none.
    pub threads: Option<usize>,
    /// Longest sequence in tokens.
    pub context: Option<u32>,
    /// How keys and values are stored.
    pub kv: Kv,
    /// Bytes of memory that models may take; what is free, where none.
    pub memory: Option<u64>,
    /// Guess the next tokens, where text repeats itself or by a draft model, and check several in one step; the tokens are the same either way.
    pub speculation: bool,
    /// What a million tokens of prompts cost on this machine when it is a node, in dollars: its energy.
    pub prompt_usd_per_mtok: f64,
    /// The same of tokens of output.
    pub output_usd_per_mtok: f64,
    /// What policies know of this machine when it is a node: `kind`, `country`, `zone`, and any other name.
    pub labels: BTreeMap<String, String>,
    /// The routing policy: a file, or the name of one that comes with weir.
    pub policy: Option<String>,
    /// Where models are kept; the platform's cache folder where none.
    pub cache: Option<PathBuf>,
    /// A further catalog of models, whose names come before the built-in ones.
    pub catalog: Option<PathBuf>,
    /// Where a scheduler keeps its cluster, and a node its key; the platform's folder for state where none.
    pub state: Option<PathBuf>,
    /// An etcd in which several schedulers keep what they share: `http://HOST:2379`, several with commas. It has the
    /// cluster's secret key then.
    pub etcd: Option<String>,
    /// What the keys there begin with; `/weir/` where none.
    pub etcd_prefix: Option<String>,
    /// Who we are there, where it asks.
    pub etcd_user: Option<String>,
    /// The user's password.
    pub etcd_password: Option<String>,
    /// Whose certificates of etcd are trusted (PEM); those that the system trusts, where none.
    pub etcd_ca: Option<PathBuf>,
    /// Whom requests may be sent on to: `[[provider]]` each.
    pub provider: Vec<Entry>,
    /// What is logged to stderr: `warn`, `info`, `weir=debug`, ...
    pub log: String,
    /// What log lines look like: `text`, `json`.
    pub log_format: LogFormat,
    /// Where `/metrics` is told without a key, in plain HTTP, besides the gateway.
    pub metrics: Option<SocketAddr>,
    /// A collector that takes OTLP over HTTP (`http://127.0.0.1:4318`): traces and metrics go there.
    /// `OTEL_EXPORTER_OTLP_ENDPOINT` is the same. Nothing leaves without.
    pub otlp: Option<String>,
    /// The names of what is told: `newest`, `1.36` or `both` (OpenTelemetry's conventions for generative AI).
    pub conventions: Option<Conventions>,
}

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kv {
    /// Half precision.
    #[default]
    F16,
    /// 8 bits, about half the memory.
    Q8_0,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            model: None,
            draft: None,
            http: SocketAddr::from(([127, 0, 0, 1], 8484)),
            api_key: None,
            tls_cert: None,
            tls_key: None,
            insecure_http: false,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            url: None,
            key: None,
            device: DeviceChoice::Auto,
            threads: None,
            context: None,
            kv: Kv::F16,
            memory: None,
            speculation: true,
            prompt_usd_per_mtok: 0.0,
            output_usd_per_mtok: 0.0,
            labels: BTreeMap::new(),
            policy: None,
            cache: None,
            catalog: None,
            state: None,
            etcd: None,
            etcd_prefix: None,
            etcd_user: None,
            etcd_password: None,
            etcd_ca: None,
            provider: Vec::new(),
            log: "warn".into(),
            log_format: LogFormat::Text,
            metrics: None,
            otlp: None,
            conventions: None,
        }
    }
}

/// Configuration that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was asked for isn't there.
    #[error("there is no configuration file {}", .0.display())]
    NoFile(PathBuf),
    /// A value is wrong; the message names it and where it comes from.
    #[error("configuration: {0}")]
    Wrong(#[from] Box<figment::Error>),
    /// A `[[provider]]` makes no sense.
    #[error("configuration: {0}")]
    Provider(#[from] CatalogError),
    /// An address makes no sense.
    #[error("configuration: {0}")]
    Upstream(#[from] UpstreamError),
    /// A provider's key isn't there.
    #[error("configuration: provider `{name}`: {problem}; set {remedy}")]
    Key {
        /// Whose.
        name: String,
        /// What is wrong.
        problem: String,
        /// Where it is set.
        remedy: String,
    },
    /// A number with which nothing works.
    #[error("configuration: {name} is {value}; it must be at least {least}")]
    TooSmall {
        /// Of the value; in the environment it is `WEIR_` and this in upper case.
        name: &'static str,
        /// As it was given.
        value: u32,
        /// As it may be.
        least: u32,
    },
    /// Telemetry can't be sent as it should be.
    #[error("configuration: telemetry: {0}")]
    Telemetry(String),
    /// Etcd can't be asked so.
    #[error("configuration: etcd: {0}")]
    Etcd(String),
    /// More is said of this machine than anybody wants to hear.
    #[error("configuration: {0}")]
    Labels(String),
}

/// A prompt with its template takes more than this, so less context is a mistake.
const CONTEXT_MIN: u32 = 32;

/// The process's environment.
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Variables of the environment that say something of the configuration.
fn variables() -> Env {
    let known = [
        "model",
        "draft",
        "http",
        "api_key",
        "tls_cert",
        "tls_key",
        "insecure_http",
        "allowed_hosts",
        "allowed_origins",
        "url",
        "key",
        "device",
        "threads",
        "context",
        "kv",
        "memory",
        "speculation",
        "prompt_usd_per_mtok",
        "output_usd_per_mtok",
        "labels",
        "policy",
        "cache",
        "catalog",
        "state",
        "etcd",
        "etcd_prefix",
        "etcd_user",
        "etcd_password",
        "etcd_ca",
        "log",
        "log_format",
        "metrics",
        "otlp",
        "conventions",
    ];
    // an empty variable is an absent one
    let set = move |name: &figment::value::UncasedStr| {
        let name = name.as_str().to_ascii_lowercase();
        let full = format!("WEIR_{}", name.to_ascii_uppercase());
        known.contains(&name.as_str()) && environment(&full).is_some_and(|v| !v.is_empty())
    };
    Env::prefixed("WEIR_").filter(set)
}

impl Config {
    /// Defaults, then `file` or else the first of `$WEIR_CONFIG`, `./weir.toml` and the user's own `weir/weir.toml`,
    /// then the environment.
    pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
        Config::of(Config::layers(file)?.merge(variables()))
    }

    /// What lies below the environment.
    fn layers(file: Option<&Path>) -> Result<Figment, ConfigError> {
        let mut layers = Figment::from(Serialized::defaults(Config::default()));
        let named = file.map(Path::to_owned).or_else(|| environment("WEIR_CONFIG").map(PathBuf::from));
        match named {
            Some(path) if !path.is_file() => return Err(ConfigError::NoFile(path)),
            Some(path) => layers = layers.merge(Toml::file_exact(path)),
            None => {
                let usual = [Some(PathBuf::from("weir.toml")), user_file()];
                if let Some(path) = usual.into_iter().flatten().find(|p| p.is_file()) {
                    layers = layers.merge(Toml::file_exact(path));
                }
            }
        }
        Ok(layers)
    }

    fn of(layers: Figment) -> Result<Config, ConfigError> {
        let config: Config = layers.extract().map_err(Box::new)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let small = |name, value, least| Err(ConfigError::TooSmall { name, value, least });
        match (self.threads, self.context) {
            (Some(0), _) => small("threads", 0, 1),
            (_, Some(context)) if context < CONTEXT_MIN => small("context", context, CONTEXT_MIN),
            _ => self.check_labels(),
        }
    }

    fn check_labels(&self) -> Result<(), ConfigError> {
        if self.labels.len() > LABELS_MAX {
            let count = self.labels.len();
            return Err(ConfigError::Labels(format!("there are {count} labels; at most {LABELS_MAX}")));
        }
        for (name, value) in &self.labels {
            if name.is_empty() || name.len().max(value.len()) > LABEL_BYTES_MAX {
                let bounds = format!("names have 1 to {LABEL_BYTES_MAX} bytes, values at most as many");
                return Err(ConfigError::Labels(format!("label {name:?}: {bounds}")));
            }
        }
        Ok(())
    }

    /// What is said of this machine when it is a node.
    pub fn labels(&self) -> Vec<(String, String)> {
        self.labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// What a token costs on this machine, in billionths of a dollar; a price below 0 or without end is none.
    pub fn price(&self) -> Price {
        let nano = |usd_per_mtok: f64| (usd_per_mtok * 1e3).round() as u64;
        Price { prompt: nano(self.prompt_usd_per_mtok), output: nano(self.output_usd_per_mtok) }
    }

    /// Whom requests may be sent on to, with their keys. Nobody, unless this configuration names them.
    pub fn upstreams(&self) -> Result<Vec<Upstream>, ConfigError> {
        if self.provider.is_empty() {
            return Ok(Vec::new());
        }
        let providers = Catalog::built_in()?.resolve_all(&self.provider)?;
        let upstream = |provider: Provider| {
            let key = key_of(&provider)?;
            if let Some(day) = &provider.priced {
                tracing::info!(
                    "{}: prices are from {day}; newer ones go into `models` of weir.toml",
                    provider.name
                );
            }
            Ok(Upstream::new(provider, key, Times::default())?)
        };
        providers.into_iter().map(upstream).collect()
    }

    /// The etcd in which schedulers keep what they share: what was asked for, or what is configured.
    pub fn etcd(
        &self,
        endpoints: Option<&str>,
        prefix: Option<&str>,
    ) -> Result<Option<EtcdConfig>, ConfigError> {
        let Some(endpoints) = endpoints.or(self.etcd.as_deref()) else { return Ok(None) };
        let mut prefix = prefix.or(self.etcd_prefix.as_deref()).unwrap_or("/weir/").to_owned();
        if !prefix.ends_with('/') {
            prefix.push('/');
        }
        let user = match (&self.etcd_user, &self.etcd_password) {
            (Some(user), Some(password)) => Some((user.clone(), password.clone())),
            (None, None) => None,
            _ => return Err(ConfigError::Etcd("etcd_user and etcd_password go together".into())),
        };
        let endpoints = endpoints.split(',').map(|url| url.trim().to_owned()).collect();
        Ok(Some(EtcdConfig { endpoints, prefix, user, ca: self.etcd_ca.clone() }))
    }

    /// The model store that this configuration asks for.
    pub fn store(&self) -> Result<StoreConfig, StoreError> {
        let text = |path: &Option<PathBuf>| path.as_ref().map(|p| p.display().to_string());
        StoreConfig::from_env(|name| match name {
            "WEIR_CACHE" => text(&self.cache),
            "WEIR_CATALOG" => text(&self.catalog),
            _ => environment(name),
        })
    }
}

impl Config {
    /// The folder for state: what was asked for, or the user's own `weir`.
    pub fn state_folder(&self, asked: Option<&Path>) -> Option<PathBuf> {
        let set = |name| environment(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let usual = || match cfg!(windows) {
            true => Some(set("LOCALAPPDATA")?.join("weir/state")),
            false => {
                Some(set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?.join("weir"))
            }
        };
        asked.map(Path::to_owned).or_else(|| self.state.clone()).or_else(usual)
    }
}

/// A provider's key. A company's must be there; an engine of our own may want none.
fn key_of(provider: &Provider) -> Result<Option<Secret>, ConfigError> {
    let wrong = |problem: String| {
        Err(ConfigError::Key { name: provider.name.clone(), problem, remedy: provider.key_remedy() })
    };
    let text = match (&provider.key_file, &provider.key_env) {
        (Some(file), _) => match std::fs::read_to_string(file) {
            Ok(text) => Some(text),
            Err(error) => return wrong(format!("its key can't be read: {error}")),
        },
        (None, Some(name)) => environment(name),
        (None, None) => None,
    };
    match text.as_deref().filter(|text| !text.trim().is_empty()) {
        Some(text) => match Secret::new(text) {
            Some(key) => Ok(Some(key)),
            None => wrong("its key isn't one line of visible ASCII characters".into()),
        },
        None if provider.whose == Whose::Own || provider.auth == Auth::None => Ok(None),
        None => wrong("its key is missing".into()),
    }
}

/// The user's own configuration file, whether it exists or not.
fn user_file() -> Option<PathBuf> {
    let set = |name| environment(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = if cfg!(windows) {
        set("APPDATA")?
    } else {
        set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?
    };
    Some(folder.join("weir/weir.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<Config, &str>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir.toml");
        std::fs::write(&path, text).unwrap();
        // whatever the environment of whoever runs this says
        match (Config::layers(Some(&path)).and_then(Config::of), expected) {
            (Ok(config), Ok(expected)) => assert_eq!(config, expected),
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (got, expected) => panic!("{text}: {got:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn providers_need_keys_and_nobody_is_asked_without_one() {
        let check = |text: &str, expected: Result<usize, &str>| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("key"), "sk-123\n").unwrap();
            let path = folder.path().join("weir.toml");
            std::fs::write(&path, text.replace("HERE", folder.path().to_str().unwrap())).unwrap();
            let upstreams = Config::load(Some(&path)).unwrap().upstreams();
            match (upstreams, expected) {
                (Ok(upstreams), Ok(count)) => assert_eq!(upstreams.len(), count, "{text}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{text}: {got:?} instead of {expected:?}"),
            }
        };
        check("", Ok(0));
        check("[[provider]]\nname = 'openai'\nkey_file = 'HERE/key'", Ok(1));
        let priced =
            "models = ['gpt-5', { name = 'gpt-5-mini', usd_per_mtok = { prompt = 0.3, output = 2.4 } }]";
        check(&format!("[[provider]]\nname = 'openai'\nkey_file = 'HERE/key'\n{priced}"), Ok(1));
        check("[[provider]]\nname = 'openai'\nkey_file = 'HERE/none'", Err("can't be read"));
        check(
            "[[provider]]\nname = 'openai'\nkey_env = 'WEIR_NO_SUCH_KEY'",
            Err("set WEIR_NO_SUCH_KEY in the env"),
        );
        check("[[provider]]\nname = 'vllm'\nurl = 'http://box:8000'", Ok(1));
        check("[[provider]]\nname = 'vllm'\nurl = 'ftp://box'", Err("is no address"));
    }

    #[test]
    fn files_are_read_and_checked() {
        check("", Ok(Config::default()));
        let http = SocketAddr::from(([0, 0, 0, 0], 80));
        let set = Config { model: Some("m".into()), http, kv: Kv::Q8_0, ..Config::default() };
        check("model = 'm'\nhttp = '0.0.0.0:80'\nkv = 'q8_0'", Ok(set));
        check("modle = 'm'", Err("modle"));
        check("[[provider]]\nname = 'openai'\nmodles = []", Err("modles"));
        check("http = 'here'", Err("http"));
        check("model = ", Err("configuration"));
        check("threads = 0", Err("threads is 0; it must be at least 1"));
        check("context = 31", Err("context is 31; it must be at least 32"));
        check("context = -1", Err("context"));
        check("policy = 'local-only'", Ok(Config { policy: Some("local-only".into()), ..Config::default() }));
        let labels = BTreeMap::from([("country".into(), "DE".into())]);
        check("labels.country = 'DE'", Ok(Config { labels, ..Config::default() }));
        check("labels.country = 7", Err("labels"));
        check(&format!("labels.x = '{}'", "x".repeat(101)), Err("label \"x\": names have 1 to 100 bytes"));
        let many: String = (0..33).map(|n| format!("labels.l{n} = ''\n")).collect();
        check(&many, Err("there are 33 labels; at most 32"));
        let missing = Config::load(Some(Path::new("/nonexistent/weir.toml"))).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/weir.toml"));
    }
}
