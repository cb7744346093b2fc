//! Whether a smaller model can guess for a larger one.
use super::LoadError;
use crate::gguf::{ModelFile, Strings};
use std::path::Path;

/// How many tokens two files have in common, from the first on: all of the smaller vocabulary, since what else a larger one
/// has behind it is padding, which no text has. An error that says what is different where their tokenizers aren't the same.
pub(super) fn same_tokens(model: &ModelFile, draft: &ModelFile, path: &Path) -> Result<u32, LoadError> {
    let other = |why: String| Err(LoadError::DraftTokens { path: path.into(), why });
    let kind = |file| ModelFile::optional::<&str>(file, "tokenizer.ggml.model");
    let (kind_of_model, kind_of_draft) = (kind(model)?, kind(draft)?);
    if kind_of_model != kind_of_draft {
        let name = |kind: Option<&str>| kind.unwrap_or("none").to_owned();
        return other(format!("it is `{}`, the model's is `{}`", name(kind_of_draft), name(kind_of_model)));
    }
    let tokens = |file| ModelFile::required::<&Strings>(file, "tokenizer.ggml.tokens");
    let (of_model, of_draft) = (tokens(model)?, tokens(draft)?);
    let common = of_model.len().min(of_draft.len());
    let differs = |id: &usize| of_model.get(*id) != of_draft.get(*id);
    if let Some(id) = (0..common).find(differs) {
        let text = |of: &Strings| of.get(id).unwrap_or_default().to_owned();
        return other(format!("token {id} is {:?} there, {:?} in the model", text(of_draft), text(of_model)));
    }
    let (longer, count) = if of_model.len() > common { (of_model, "fewer") } else { (of_draft, "more") };
    let padding = |id: usize| longer.get(id).is_some_and(|text| text.starts_with("[PAD"));
    if !(common..longer.len()).all(padding) {
        return other(format!("it has {count} tokens: {}, the model has {}", of_draft.len(), of_model.len()));
    }
    Ok(u32::try_from(common).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::write::Writer;

    fn file(kind: &str, tokens: &[&str]) -> ModelFile {
        let mut writer = Writer::new("llama");
        writer.set("tokenizer.ggml.model", kind);
        writer.set("tokenizer.ggml.tokens", tokens.iter().copied().collect::<Strings>());
        ModelFile::from_bytes(writer.to_bytes(|_| Vec::new())).unwrap()
    }

    #[test]
    fn tokenizers_are_the_same_or_it_is_said_how_they_differ() {
        let model = file("gpt2", &["a", "b", "c"]);
        let check = |draft: ModelFile| same_tokens(&model, &draft, Path::new("small.gguf"));
        assert_eq!(check(file("gpt2", &["a", "b", "c"])).unwrap(), 3);
        assert_eq!(check(file("gpt2", &["a", "b", "c", "[PAD3]", "[PAD4]"])).unwrap(), 3);
        let says = |draft: ModelFile, what: &str| {
            let why = check(draft).unwrap_err().to_string();
            assert!(why.contains("small.gguf") && why.contains(what), "{why}");
        };
        says(file("llama", &["a", "b", "c"]), "it is `llama`, the model's is `gpt2`");
        says(file("gpt2", &["a", "x", "c"]), "token 1 is \"x\" there, \"b\" in the model");
        says(file("gpt2", &["a", "b"]), "it has fewer tokens: 2, the model has 3");
        says(file("gpt2", &["a", "b", "c", "d"]), "it has more tokens: 4, the model has 3");
    }
}
