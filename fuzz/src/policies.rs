//! Takes any text for a policy file: no panic, no overflow, no long time; and what is a policy judges a request, of which
//! what is private stays home. Also as a table of expectations, and as a pool.
#![no_main]

use std::sync::LazyLock;
use weir_policies::{Outcome, PoolFile, RequestFile, Rules, SHIPPED, Table, explain};

/// Of a shipped table.
static POOL: LazyLock<PoolFile> = LazyLock::new(|| {
    let table = Table::parse(SHIPPED[0].table).expect("it ships");
    PoolFile { nodes: table.nodes, queue: 3, time: Some("Mon 10:30".into()), ..PoolFile::default() }
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(rules) = Rules::parse(text) {
        let request = RequestFile {
            model: "m".into(),
            tags: [("private".into(), String::new()), ("team".into(), "blue".into())].into(),
            max_usd: Some(0.01),
            ..RequestFile::default()
        };
        let explained = explain(&rules, &POOL, &request).expect("the pool makes sense");
        if let Outcome::Goes(node) = explained.outcome {
            assert!(node == "desk" || node == "server", "what is private goes to {node}");
        }
    }
    if let Ok(table) = Table::parse(text) {
        table.mismatches(text, &Rules::default());
    }
    if let Ok(pool) = PoolFile::parse(text) {
        _ = explain(&Rules::default(), &pool, &RequestFile { model: "m".into(), ..RequestFile::default() });
    }
});
