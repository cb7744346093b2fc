//! A model in a window of its own: the page loads the SDK, and this program hands it the model's file.
//!
//!     weir-tauri-example --model FILE.gguf [--ask PROMPT]
//!     weir-tauri-example --cluster URL [--key KEY] [--ask PROMPT]
//!
//! With `--ask` the page puts that question when its model is there, and the answer is printed, too.
#![forbid(unsafe_code)]
#![cfg_attr(not(debug_assertions), windows_subsystem = "windows")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use tauri::http::{Request, Response, StatusCode, header};

/// No answer to the page is larger: it asks for pieces.
const MOST: u64 = 64 << 20;

/// What the command line says.
#[derive(Clone, Default)]
struct Wishes {
    model: Option<PathBuf>,
    cluster: Option<String>,
    key: Option<String>,
    ask: Option<String>,
}

impl Wishes {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Wishes, String> {
        let mut wishes = Wishes::default();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
            match word.as_str() {
                "--model" => wishes.model = Some(value()?.into()),
                "--cluster" => wishes.cluster = Some(value()?),
                "--key" => wishes.key = Some(value()?),
                "--ask" => wishes.ask = Some(value()?),
                other => return Err(format!("unknown: {other}")),
            }
        }
        match (&wishes.model, &wishes.cluster) {
            (None, None) => Err("give --model FILE.gguf or --cluster URL".to_owned()),
            _ => Ok(wishes),
        }
    }
}

/// What the page is to do: whether there is a model file, the cluster's address, its key, and a first question.
#[tauri::command]
fn wishes(wishes: tauri::State<'_, Wishes>) -> (bool, Option<String>, Option<String>, Option<String>) {
    let Wishes { model, cluster, key, ask } = wishes.inner().clone();
    (model.is_some(), cluster, key, ask)
}

/// The page's model, once it is there.
#[tauri::command]
fn ready(about: String) {
    println!("ready: {about}");
}

/// The answer to the first question.
#[tauri::command]
fn answered(text: String) {
    println!("answer: {}", text.replace('\n', " "));
}

/// The page can't go on.
#[tauri::command]
fn failed(app: tauri::AppHandle, message: String) {
    eprintln!("error: {message}");
    app.exit(1);
}

/// The model's bytes: all of them, or a range of them.
fn model(path: Option<&PathBuf>, request: &Request<Vec<u8>>) -> Response<Vec<u8>> {
    let range = request.headers().get(header::RANGE).and_then(|range| range.to_str().ok());
    let answer =
        path.ok_or_else(|| std::io::Error::other("no model was given")).and_then(|path| read(path, range));
    let (status, about, bytes) =
        answer.unwrap_or_else(|error| (StatusCode::NOT_FOUND, String::new(), error.to_string().into_bytes()));
    let response = Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, bytes.len())
        // The page has another origin than the file.
        .header(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*")
        .header(header::ACCESS_CONTROL_ALLOW_HEADERS, "*")
        .header(header::ACCESS_CONTROL_EXPOSE_HEADERS, "*")
        .header("cross-origin-resource-policy", "cross-origin");
    let response = if about.is_empty() { response } else { response.header(header::CONTENT_RANGE, about) };
    response.body(bytes).unwrap_or_default()
}

/// Status, what part it is, and the bytes.
fn read(path: &PathBuf, range: Option<&str>) -> std::io::Result<(StatusCode, String, Vec<u8>)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let asked = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (status, from, to) = match asked {
        Some((from, to)) => {
            let from: u64 = from.parse().map_err(std::io::Error::other)?;
            let to = to.parse().unwrap_or(u64::MAX).min(size.saturating_sub(1));
            (StatusCode::PARTIAL_CONTENT, from, to.saturating_add(1).max(from))
        }
        None => (StatusCode::OK, 0, size),
    };
    if to - from > MOST {
        return Err(std::io::Error::other("ask for a smaller range"));
    }
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    file.take(to - from).read_to_end(&mut bytes)?;
    let about = if status == StatusCode::OK {
        String::new()
    } else {
        format!("bytes {from}-{}/{size}", to.saturating_sub(1))
    };
    Ok((status, about, bytes))
}

fn main() {
    let wished = match Wishes::read(std::env::args().skip(1)) {
        Ok(wished) => wished,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(2);
        }
    };
    let path = wished.model.clone();
    let run = tauri::Builder::default()
        .manage(wished)
        .register_asynchronous_uri_scheme_protocol("model", move |_, request, responder| {
            let path = path.clone();
            std::thread::spawn(move || responder.respond(model(path.as_ref(), &request)));
        })
        .invoke_handler(tauri::generate_handler![wishes, ready, answered, failed])
        .run(tauri::generate_context!());
    if let Err(error) = run {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
