//! What a node of this program can be told to load: models of its catalog, and files that it was told of.
use super::start::{DeviceOptions, ModelSource, ModelSpec, load};
use std::collections::HashMap;
use weir_backends::null::NULL_MODEL;
use weir_backends::store::{Listed, State, Store, StoreError};
use weir_node::{Loaded, Stock};
use weir_scheduler::{ModelId, Offered};

/// KV cache worth having, at least: as a share of the weights, and in bytes.
const KV_SHARE: u64 = 2;
const KV_MIN: u64 = 64 << 20;

/// Offers the models of the catalog that are on this machine, and no others: nothing is fetched.
pub fn stock_here(store: Store, device: DeviceOptions) -> Result<Stock, StoreError> {
    let here =
        |listed: Listed<'_>| matches!(listed.state, State::Present(_)).then(|| listed.model.name.clone());
    let named: Vec<String> = store.list().into_iter().filter_map(here).collect();
    match named.is_empty() {
        true => Ok(Stock::none()),
        false => stock(store, &named, device),
    }
}

/// Offers the models of these names and paths; those of the catalog, where there are none. What isn't on this machine
/// yet is fetched when it is wanted.
pub fn stock(store: Store, named: &[String], device: DeviceOptions) -> Result<Stock, StoreError> {
    let mut goods: HashMap<ModelId, ModelSpec> = HashMap::new();
    let mut offers = Vec::new();
    let catalog: Vec<String>;
    let named = match named {
        [] => {
            catalog = store.catalog().models().iter().map(|m| m.name.clone()).collect();
            &catalog
        }
        named => named,
    };
    for name in named {
        let offer = match (ModelSpec::parse_null(name), store.catalog().find(name)) {
            (Some(Ok(spec)), _) => {
                let name = spec.name.clone();
                goods.insert(NULL_MODEL, spec);
                Offered { model: NULL_MODEL, name, weights: 0, bytes: 0 }
            }
            (_, Some(model)) => offered(model.name.clone(), model.sha256, model.size),
            (_, None) => {
                let found = store.resolve(name)?;
                let weights = std::fs::metadata(&found.path).map_or(0, |about| about.len());
                let offer = offered(found.name.clone(), found.sha256, weights);
                goods.insert(offer.model, found.into());
                offer
            }
        };
        offers.push(offer);
    }
    let load = move |offer: &Offered, bytes: u64| -> Result<Loaded, String> {
        let spec = match goods.get(&offer.model) {
            Some(spec) => spec.clone(),
            None => store.pull(&offer.name, &mut |_| ()).map_err(|error| error.to_string())?.into(),
        };
        let memory = match &spec.source {
            ModelSource::Null(_) => device.memory,
            ModelSource::File { .. } => Some(bytes),
        };
        load(&spec, DeviceOptions { memory, ..device }).map_err(|error| error.to_string())
    };
    Ok(Stock::new(offers, Box::new(load)))
}

fn offered(name: String, sha256: [u8; 32], weights: u64) -> Offered {
    // Weights grow a little when they are repacked.
    let bytes = weights / 8 * 9 + (weights / KV_SHARE).max(KV_MIN);
    Offered { model: ModelId(sha256), name, weights, bytes }
}
