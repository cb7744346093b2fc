//! Providers: how each is spoken to, which models it has, and what they cost.
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How an upstream is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// OpenAI's `/v1/chat/completions`.
    #[default]
    #[serde(rename = "openai")]
    OpenAi,
    /// Anthropic's `/v1/messages`.
    Anthropic,
}

/// How a key is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// `Authorization: Bearer KEY`.
    #[default]
    Bearer,
    /// `x-api-key: KEY`.
    XApiKey,
    /// Not at all.
    None,
}

/// Whose an upstream is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// A company's, for money.
    #[default]
    Provider,
    /// An engine of our own.
    Own,
}

/// What runs there: engines differ in how they tell their health, their queue and their models' contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Unknown.
    #[default]
    Any,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp's server.
    LlamaServer,
    /// Ollama.
    Ollama,
}

/// How an answer can be begun for a model, so that it goes on from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefill {
    /// It can't.
    #[default]
    None,
    /// A last message of the assistant is gone on with.
    Plain,
    /// The same, if that message has `prefix: true`.
    Prefix,
    /// The same, if the request has `continue_final_message: true`.
    Continue,
}

/// The field that bounds an answer's length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthField {
    /// The old name, which all but OpenAI's newer models know.
    #[default]
    MaxTokens,
    /// The new one.
    MaxCompletionTokens,
}

/// Dollars for a million tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Of a prompt.
    pub prompt: f64,
    /// Of a prompt, where the provider has them cached; as others where none.
    #[serde(default)]
    pub cached: Option<f64>,
    /// Of a prompt, written to a cache for later; as others where none.
    #[serde(default)]
    pub cache_write: Option<f64>,
    /// Of output.
    pub output: f64,
}

/// A model of a provider.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The provider's own name for it.
    pub name: String,
    /// Longest prompt and output, in tokens.
    #[serde(default = "context_guess")]
    pub context: u32,
    /// Longest output, in tokens.
    #[serde(default)]
    pub output_max: Option<u32>,
    /// What its tokens cost; it can't be used where nobody knows, unless it is our own.
    #[serde(default)]
    pub usd_per_mtok: Option<Prices>,
    /// It calls tools.
    #[serde(default)]
    pub tools: bool,
    /// It sees images.
    #[serde(default)]
    pub images: bool,
    /// How it goes on after the beginning of an answer; as the provider's others where none.
    #[serde(default)]
    pub prefill: Option<Prefill>,
}

/// Tokens of context that are taken for granted where nobody says.
fn context_guess() -> u32 {
    8192
}

impl Model {
    /// A model of which only the name is known.
    pub fn named(name: impl Into<String>) -> Model {
        Model {
            name: name.into(),
            context: context_guess(),
            output_max: None,
            usd_per_mtok: None,
            tools: false,
            images: false,
            prefill: None,
        }
    }
}

/// A model in a list: by name where the catalog knows it, else described.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ModelEntry {
    /// By name.
    Named(String),
    /// Described.
    Described(Model),
}

impl ModelEntry {
    fn name(&self) -> &str {
        match self {
            ModelEntry::Named(name) => name,
            ModelEntry::Described(model) => &model.name,
        }
    }
}

/// A `[[provider]]` of weir.toml, or a row of the catalog. What it doesn't say, the catalog's row of that name does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What it is called here: its models are asked for as `NAME/MODEL`.
    pub name: String,
    /// The catalog's row that it is like, if that has another name.
    #[serde(default)]
    pub like: Option<String>,
    /// Its address; `/v1` is added where there is no version.
    #[serde(default)]
    pub url: Option<String>,
    /// How it is spoken to.
    #[serde(default)]
    pub api: Option<Dialect>,
    /// How its key is sent.
    #[serde(default)]
    pub auth: Option<Auth>,
    /// The variable of the environment that has its key.
    #[serde(default)]
    pub key_env: Option<String>,
    /// The file that has its key.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// Whose it is.
    #[serde(default)]
    pub trust: Option<Whose>,
    /// What runs there.
    #[serde(default)]
    pub engine: Option<Engine>,
    /// The field that bounds an answer's length.
    #[serde(default)]
    pub length_field: Option<LengthField>,
    /// How an answer can be begun for its models.
    #[serde(default)]
    pub prefill: Option<Prefill>,
    /// It tells usage in a stream only if asked to, by `stream_options`; some refuse to be asked.
    #[serde(default)]
    pub stream_options: Option<bool>,
    /// Fields of requests that it refuses: they are left out.
    #[serde(default)]
    pub refuses: Vec<String>,
    /// The day (`2026-10-21`) that the prices of its models are from.
    #[serde(default)]
    pub priced: Option<String>,
    /// Its models: those of the catalog's row where none; those that it tells of, where it is our own.
    #[serde(default)]
    pub models: Vec<ModelEntry>,
    /// Requests that it is sent at once, at most.
    #[serde(default)]
    pub slots: Option<u32>,
    /// What its owner says of it, for policies: `country`, `zone`, ...
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// An upstream, with nothing left to look up but its key.
#[derive(Clone, Debug, PartialEq)]
pub struct Provider {
    /// What it is called here.
    pub name: String,
    /// Its address.
    pub url: String,
    /// How it is spoken to.
    pub dialect: Dialect,
    /// How its key is sent.
    pub auth: Auth,
    /// The variable of the environment that has its key.
    pub key_env: Option<String>,
    /// The file that has its key.
    pub key_file: Option<PathBuf>,
    /// Whose it is.
    pub whose: Whose,
    /// What runs there.
    pub engine: Engine,
    /// The field that bounds an answer's length.
    pub length_field: LengthField,
    /// It is asked for usage in streams.
    pub stream_options: bool,
    /// Fields of requests that are left out.
    pub refuses: Vec<String>,
    /// How its models go on after the beginning of an answer, where they don't say.
    pub prefill: Prefill,
    /// Its models; those that it tells of are further ones, where it is our own and the list is empty.
    pub models: Vec<Model>,
    /// The day that prices of its models are from which nobody here has named, where there are any.
    pub priced: Option<String>,
    /// Requests that it is sent at once, at most.
    pub slots: u32,
    /// What its owner says of it.
    pub labels: Vec<(String, String)>,
}

/// Requests that an upstream is sent at once, unless told.
const SLOTS: u32 = 64;

impl Provider {
    /// How a model goes on after the beginning of an answer.
    pub fn prefill(&self, model: &Model) -> Prefill {
        model.prefill.unwrap_or(self.prefill)
    }

    /// Where its key is set, for a person.
    pub fn key_remedy(&self) -> String {
        match (&self.key_env, &self.key_file) {
            (_, Some(file)) => format!("the file {}", file.display()),
            (Some(name), None) => format!("{name} in the environment"),
            (None, None) => "key_env or key_file in weir.toml".into(),
        }
    }
}

/// Rows of providers that are well known.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalog(Vec<Entry>);

/// A `[[provider]]` that makes no sense.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CatalogError {
    /// The catalog is no TOML, or not of this shape.
    #[error("the catalog of providers: {0}")]
    Malformed(String),
    /// A name that can't be the first part of a model's.
    #[error("provider `{0}`: a name is 1 to 64 letters, digits, dots, dashes or underscores")]
    Name(String),
    /// Two of one name.
    #[error(
        "provider `{0}` is configured twice; leave one out, or give it another name and `like = \"{0}\"`"
    )]
    Twice(String),
    /// No row of that name, and no address.
    #[error("provider `{name}`: the catalog has no such row, so it needs a `url`; it has: {known}")]
    Unknown {
        /// Its name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// A row without an address of its own: its owner knows it.
    #[error("provider `{name}`: it needs a `url`, such as {example}")]
    NoUrl {
        /// Its name.
        name: String,
        /// Where such engines usually listen.
        example: &'static str,
    },
    /// Nobody knows what it costs.
    #[error(
        "provider `{provider}`: nobody knows what `{model}` costs; say so: models = [{{ name = \"{model}\", context = \
         128000, usd_per_mtok = {{ prompt = 0.5, output = 1.5 }} }}]"
    )]
    NoPrice {
        /// Whose.
        provider: String,
        /// Which.
        model: String,
    },
    /// It has none, and will not be asked.
    #[error("provider `{0}`: name its `models`, with what they cost")]
    NoModels(String),
    /// A price or a number of tokens with which nothing works.
    #[error("provider `{provider}`: {what}")]
    Number {
        /// Whose.
        provider: String,
        /// What is wrong.
        what: String,
    },
}

impl Catalog {
    /// The rows that come with the program.
    pub fn built_in() -> Result<Catalog, CatalogError> {
        Catalog::parse(include_str!("../catalog.toml"))
    }

    /// Rows in TOML: `[[provider]]` each.
    pub fn parse(text: &str) -> Result<Catalog, CatalogError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            provider: Vec<Entry>,
        }
        let file: File = toml::from_str(text).map_err(|e| CatalogError::Malformed(e.to_string()))?;
        Ok(Catalog(file.provider))
    }

    /// The rows.
    pub fn rows(&self) -> &[Entry] {
        &self.0
    }

    /// The upstreams that are configured, completed by the rows.
    pub fn resolve_all(&self, entries: &[Entry]) -> Result<Vec<Provider>, CatalogError> {
        let mut all: Vec<Provider> = Vec::with_capacity(entries.len());
        for entry in entries {
            let provider = self.resolve(entry)?;
            if all.iter().any(|other| other.name == provider.name) {
                return Err(CatalogError::Twice(provider.name));
            }
            all.push(provider);
        }
        Ok(all)
    }

    /// One upstream, completed by the row of its name.
    pub fn resolve(&self, entry: &Entry) -> Result<Provider, CatalogError> {
        let name = entry.name.clone();
        let fit = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(fit) {
            return Err(CatalogError::Name(name));
        }
        let wanted = entry.like.as_ref().unwrap_or(&name);
        let row = self.0.iter().find(|row| row.name == *wanted);
        if row.is_none() && (entry.url.is_none() || entry.like.is_some()) {
            let known: Vec<&str> = self.0.iter().map(|row| row.name.as_str()).collect();
            return Err(CatalogError::Unknown { name, known: known.join(", ") });
        }
        let nothing = Entry::default();
        let row = row.unwrap_or(&nothing);
        let engine = entry.engine.or(row.engine).unwrap_or_default();
        let Some(url) = entry.url.clone().or_else(|| row.url.clone()) else {
            return Err(CatalogError::NoUrl { name, example: usual_address(engine) });
        };
        let whose = entry.trust.or(row.trust).unwrap_or_default();
        let keyless = entry.key_env.is_none() && entry.key_file.is_none();
        Ok(Provider {
            models: models(entry, row, whose)?,
            url,
            dialect: entry.api.or(row.api).unwrap_or_default(),
            auth: entry.auth.or(row.auth).unwrap_or_default(),
            // An own key in place of the row's, not beside it.
            key_env: if keyless { row.key_env.clone() } else { entry.key_env.clone() },
            key_file: if keyless { row.key_file.clone() } else { entry.key_file.clone() },
            whose,
            engine,
            length_field: entry.length_field.or(row.length_field).unwrap_or_default(),
            stream_options: entry.stream_options.or(row.stream_options).unwrap_or(true),
            refuses: entry.refuses.iter().chain(&row.refuses).cloned().collect(),
            prefill: entry.prefill.or(row.prefill).unwrap_or_default(),
            priced: priced(entry, row),
            slots: entry.slots.or(row.slots).unwrap_or(SLOTS).max(1),
            labels: entry.labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
            name,
        })
    }
}

fn usual_address(engine: Engine) -> &'static str {
    match engine {
        Engine::Any | Engine::Vllm => "http://127.0.0.1:8000",
        Engine::Sglang => "http://127.0.0.1:30000",
        Engine::LlamaServer => "http://127.0.0.1:8080",
        Engine::Ollama => "http://127.0.0.1:11434",
    }
}

/// The day of the prices, unless the entry names all of them itself.
fn priced(entry: &Entry, row: &Entry) -> Option<String> {
    let described = |model: &ModelEntry| matches!(model, ModelEntry::Described(_));
    let own = !entry.models.is_empty() && entry.models.iter().all(described);
    if own { entry.priced.clone() } else { row.priced.clone() }
}

/// The models of an entry, completed by its row's.
fn models(entry: &Entry, row: &Entry, whose: Whose) -> Result<Vec<Model>, CatalogError> {
    let described = |entry: &ModelEntry| match entry {
        ModelEntry::Described(model) => Some(model.clone()),
        ModelEntry::Named(_) => None,
    };
    let known = |name: &str| row.models.iter().filter_map(described).find(|model| model.name == name);
    let wanted = if entry.models.is_empty() { &row.models } else { &entry.models };
    let mut models = Vec::with_capacity(wanted.len());
    for one in wanted {
        let model = described(one).or_else(|| known(one.name())).unwrap_or_else(|| Model::named(one.name()));
        check(&entry.name, &model, whose)?;
        models.push(model);
    }
    match models.is_empty() && whose == Whose::Provider {
        true => Err(CatalogError::NoModels(entry.name.clone())),
        false => Ok(models),
    }
}

fn check(provider: &str, model: &Model, whose: Whose) -> Result<(), CatalogError> {
    let wrong = |what: String| Err(CatalogError::Number { provider: provider.to_owned(), what });
    if model.name.is_empty() || model.name.len() > 256 {
        return wrong("a model's name has 1 to 256 bytes".into());
    }
    if model.context < 32 || model.output_max == Some(0) {
        return wrong(format!("`{}` has room for no answer", model.name));
    }
    let Some(prices) = &model.usd_per_mtok else {
        let (provider, model) = (provider.to_owned(), model.name.clone());
        return if whose == Whose::Own { Ok(()) } else { Err(CatalogError::NoPrice { provider, model }) };
    };
    let all = [Some(prices.prompt), prices.cached, prices.cache_write, Some(prices.output)];
    match all.into_iter().flatten().all(|price| (0.0..=1e6).contains(&price)) {
        true => Ok(()),
        false => wrong(format!("`{}` has a price below 0 or beyond all reason", model.name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> Entry {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_built_in_rows_make_sense() {
        let catalog = Catalog::built_in().unwrap();
        assert!(catalog.rows().len() > 8);
        for row in catalog.rows().iter().filter(|row| !row.models.is_empty()) {
            let bare = Entry { name: row.name.clone(), url: Some("http://h".into()), ..Entry::default() };
            let provider = catalog.resolve(&bare).unwrap_or_else(|e| panic!("{e}"));
            assert!(crate::address::Address::parse(&provider.url).is_some(), "{}", provider.url);
        }
        let claude = catalog.resolve(&entry("name = 'anthropic'")).unwrap();
        assert_eq!((claude.dialect, claude.auth), (Dialect::Anthropic, Auth::XApiKey));
        assert!(claude.models.iter().all(|m| m.usd_per_mtok.is_some()));
        for row in catalog.rows().iter().filter(|row| !row.models.is_empty()) {
            let day = row.priced.as_deref().unwrap_or_default();
            let parts: Vec<usize> =
                day.split('-').map(|part| part.parse::<u32>().map_or(0, |_| part.len())).collect();
            assert_eq!(parts, [4, 2, 2], "the prices of {} are from `{day}`", row.name);
        }
    }

    #[test]
    fn entries_are_completed_by_rows() {
        let catalog = Catalog::built_in().unwrap();
        let check = |text: &str, expected: Result<&[&str], &str>| {
            let names = catalog
                .resolve(&entry(text))
                .map(|p| p.models.into_iter().map(|m| m.name).collect::<Vec<_>>());
            match (names, expected) {
                (Ok(names), Ok(expected)) => assert_eq!(names, expected, "{text}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{text}: {got:?} instead of {expected:?}"),
            }
        };
        check("name = 'openai'\nmodels = ['gpt-4o-mini']", Ok(&["gpt-4o-mini"]));
        check("name = 'work'\nlike = 'openai'\nmodels = ['gpt-4o-mini']", Ok(&["gpt-4o-mini"]));
        check("name = 'openai'\nmodels = ['gpt-9']", Err("nobody knows what `gpt-9` costs"));
        check("name = 'nobody'", Err("it has: openai"));
        check("name = 'vllm'", Err("such as http://127.0.0.1:8000"));
        check("name = 'vllm'\nurl = 'http://box:8000'", Ok(&[]));
        check("name = 'x'\nurl = 'http://box:8000'", Err("name its `models`"));
        check("name = 'a/b'\nurl = 'http://box'", Err("a name is"));
        check(
            "name = 'x'\nurl = 'http://b'\nmodels = [{ name = 'm', usd_per_mtok = { prompt = -1.0, output = 1.0 } }]",
            Err("below 0"),
        );
        let two = [entry("name = 'openai'"), entry("name = 'openai'")];
        assert_eq!(catalog.resolve_all(&two), Err(CatalogError::Twice("openai".into())));
    }

    #[test]
    fn own_prices_replace_the_rows() {
        let catalog = Catalog::built_in().unwrap();
        let resolve = |models: &str| catalog.resolve(&entry(&format!("name = 'openai'\n{models}"))).unwrap();
        let day = resolve("").priced;
        assert!(day.is_some());
        let own = resolve(
            "models = ['gpt-5', { name = 'gpt-5-mini', usd_per_mtok = { prompt = 0.3, output = 2.4 } }]",
        );
        let of =
            |name: &str| own.models.iter().find(|m| m.name == name).and_then(|m| m.usd_per_mtok).unwrap();
        assert_eq!((of("gpt-5").prompt, of("gpt-5-mini").prompt, of("gpt-5-mini").cached), (1.25, 0.3, None));
        assert_eq!((own.models.len(), &own.priced), (2, &day), "those that aren't named aren't used");
        let all = resolve("models = [{ name = 'gpt-5', usd_per_mtok = { prompt = 9.0, output = 9.0 } }]");
        assert_eq!(all.priced, None, "all of them are its owner's");
    }

    #[test]
    fn an_own_key_replaces_the_rows() {
        let catalog = Catalog::built_in().unwrap();
        let provider = catalog.resolve(&entry("name = 'openai'\nkey_file = '/run/key'")).unwrap();
        let remedy = provider.key_remedy();
        assert_eq!((provider.key_env, remedy), (None, "the file /run/key".into()));
    }
}
