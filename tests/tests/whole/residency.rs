//! Models that no node holds are loaded when somebody asks for them, and make room for others.
use crate::cluster::House;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;
use weir_backends::gguf::Strings;
use weir_backends::models::random::Random;
use weir_backends::store::{Store, StoreConfig};
use weir_tests::{Node, Reply, Serve, weir};

/// Room for one of the models, with its cache, and not for two.
const MEMORY: &str = "67600000";

/// A catalog of two small models, and of one that is too large for anybody.
fn catalog(folder: &Path) -> String {
    let config = StoreConfig::from_env(|_| Some(folder.display().to_string())).unwrap();
    let store = Store::new(StoreConfig { catalogs: Vec::new(), ..config }).unwrap();
    let mut text = String::new();
    for (name, layers, padding) in [("alpha", 1, 0), ("beta", 2, 0), ("huge", 3, 4_000_000_000u64)] {
        let mut random = Random::tiny("llama", layers as u64);
        random.shape.layers = layers;
        let mut writer = random.writer();
        let tokens: Vec<String> = (0..random.shape.vocab).map(|id| format!("t{id}")).collect();
        writer.set("tokenizer.ggml.model", "gpt2");
        writer.set("tokenizer.ggml.pre", "gpt-2");
        writer.set("tokenizer.ggml.tokens", tokens.iter().map(String::as_str).collect::<Strings>());
        writer.set("tokenizer.ggml.merges", std::iter::empty::<&str>().collect::<Strings>());
        writer.set("tokenizer.ggml.eos_token_id", 0u32);
        let path = folder.join(format!("{name}.gguf"));
        let mut file = Vec::new();
        writer.write(&mut file, |tensor| random.weights(tensor)).unwrap();
        std::fs::write(&path, &file).unwrap();
        let digits: String = store.sha256_of(&path).unwrap().iter().map(|b| format!("{b:02x}")).collect();
        let size = file.len() as u64 + padding;
        let path = path.display();
        writeln!(text, "[[model]]\nname = '{name}'\nsize = {size}\nsha256 = '{digits}'").unwrap();
        writeln!(text, "[[model.source]]\nkind = 'file'\npath = '{path}'").unwrap();
    }
    let path = folder.join("catalog.toml");
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// For a program that loads from the catalog into little memory.
fn little_room<'a>(catalog: &'a str, cache: &'a str) -> [(&'a str, &'a str); 4] {
    [("WEIR_CATALOG", catalog), ("WEIR_MEMORY", MEMORY), ("WEIR_CACHE", cache), ("WEIR_CONTEXT", "64")]
}

fn complete(serve: &Serve, model: &str) -> Reply {
    let body =
        json!({ "model": model, "prompt": [7, 8, 9], "max_tokens": 8, "temperature": 0, "ignore_eos": true });
    serve.post("/v1/completions", &body.to_string()).unwrap()
}

fn answered_by(serve: &Serve, model: &str) -> Value {
    let reply = complete(serve, model);
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.json()["usage"]["completion_tokens"], 8);
    reply.json()["model"].clone()
}

#[test]
fn models_are_loaded_as_they_are_asked_for() {
    let house = House::open();
    let folder = tempfile::tempdir().unwrap();
    let (catalog, cache) = (catalog(folder.path()), folder.path().join("cache").display().to_string());
    let environment = little_room(&catalog, &cache);
    let _node = Node::join_with("attic", &house.link(&[]), &[], &environment);
    house.wait_for(&[("attic", "connected")]);
    let listed = house.serve().get("/v1/models").unwrap().json();
    assert!(listed["data"].as_array().unwrap().iter().any(|m| m["id"] == "beta"), "{listed}");

    // Nothing is loaded yet; then one is, and the other when the first has been idle for a while.
    assert_eq!(answered_by(house.serve(), "alpha"), "alpha");
    assert_eq!(answered_by(house.serve(), "auto"), "alpha", "of those that are there");
    assert_eq!(answered_by(house.serve(), "beta"), "beta");
    let held = house.nodes()[0]["models"].clone();
    assert_eq!(held.as_array().unwrap().len(), 1, "{held}");
    assert_eq!(held[0]["name"], "beta");

    let refused = complete(house.serve(), "huge");
    assert_eq!(refused.status, 404, "{}", refused.body);
    let said = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(
        said.contains("huge needs 6.") && said.contains("the closest is attic with 67.6 MB free of"),
        "{said}"
    );
    assert_eq!(complete(house.serve(), "nonsense").status, 404);
}

/// The node of `weir serve` itself does as those that join: it loads what is on its machine, and makes room.
#[test]
fn a_server_loads_what_it_has_as_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (catalog, cache) = (catalog(folder.path()), folder.path().join("cache").display().to_string());
    let environment = little_room(&catalog, &cache);
    let pulled = weir(folder.path()).args(["pull", "alpha", "beta"]).envs(environment).output().unwrap();
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
    let serve = Serve::start(&["--model", "null"], &environment);
    let listed = serve.get("/v1/models").unwrap().json();
    let mut names: Vec<&str> =
        listed["data"].as_array().unwrap().iter().filter_map(|m| m["id"].as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["alpha", "beta", "null"], "what would have to be fetched is not on offer");
    for model in ["alpha", "beta", "alpha"] {
        assert_eq!(answered_by(&serve, model), model);
    }
    assert_eq!(answered_by(&serve, "null"), "null", "what was named stays");
    assert_eq!(complete(&serve, "huge").status, 404);
    let node = serve.get("/weir/v1/nodes").unwrap().json()["nodes"][0].clone();
    assert!(node["bandwidth"].as_u64().unwrap() > 0 && !node["devices"][0].is_null(), "{node}");
    // A class counts before the name that a program can't do without.
    let body =
        json!({ "model": "whatever", "prompt": [7], "max_tokens": 2, "weir": { "model_size": "large" } });
    let reply = serve.post("/v1/completions", &body.to_string()).unwrap();
    assert_eq!((reply.status, &reply.json()["model"]), (200, &"alpha".into()), "{}", reply.body);
}
