//! Mistakes in files are told with their place, and what was expected.
use weir_policies::{Rules, schema};

fn check(text: &str, line: usize, column: usize, part: &str) {
    let problems = Rules::parse(text).err().unwrap_or_else(|| panic!("no mistake is found in\n{text}")).0;
    let first = &problems[0];
    assert!(first.message.contains(part), "{text}\n{first}");
    assert_eq!((first.line, first.column), (line, column), "{text}\n{first}");
}

#[test]
fn mistakes_have_places() {
    check("[[requires]]\nthat = 'true'", 1, 3, "did you mean `require`?");
    check("[[require]]\nthat = \"node.trsut == 'own'\"", 2, 14, "did you mean `node.trust`?");
    check("[[require]]\nwhen = 'node.load > 1.0'\nthat = 'true'", 2, 9, "can't be asked for here");
    check("[[require]]\nthat = '''\ntrue &&\nnode.name == 3'''", 4, 11, "string and int");
    check("[[require]]\nname = 'x'", 1, 1, "missing field `that`");
    check("[[require]]\nthat = 'true'\nwhat = 1", 3, 1, "unknown field `what`");
    check("[[prefer]]\nthat = 'true'\nweight = 1e9", 3, 10, "must be in -10000 to 10000");
    check("[objective]\nlatency = -1", 1, 1, "must be in 0 to 10000");
    check("[objective]\nlatancy = 1", 2, 1, "did you mean `latency`?");
    check("on_loss = 'resum'", 1, 11, "did you mean `resume`?");
    check("timezone = 'Berlin'", 1, 12, "+01:00");
    check("[spill]\nwhen = 'pool.queue'", 2, 14, "a condition is a bool");
    check("[[override]]\nwhen = 'true'\nset = { latency = 'x' }", 3, 19, "invalid type");
    check("[[budget]]\nusd_per_day = 1.0", 1, 1, "a budget is for one of");
    check("[[budget]]\nkey = 'a'", 1, 1, "limits nothing");
    check("[[budget]]\nkey = 'a'\nusd_per_day = -1", 1, 1, "usd_per_day is -1");
    check("[fallback]\na = ['a']", 1, 1, "stands in for itself");
    check("about = ", 1, 9, "");
    check(&"#".repeat(300_000), 1, 1, "at most 262144");
    check(&"[[deny]]\nthat = 'true'\n".repeat(257), 1, 1, "257 rules; at most 256");
    check(&format!("x = {}", "[".repeat(100_000)), 1, 84, "recursion limit");
}

#[test]
fn all_mistakes_are_told() {
    let text = "[[require]]\nthat = 'a'\n[[deny]]\nthat = 'b'\n[[prefer]]\nthat = 'c'\nweight = 1e9";
    let problems = Rules::parse(text).unwrap_err().0;
    assert_eq!(problems.iter().map(|problem| problem.line).collect::<Vec<_>>(), [2, 4, 6, 7]);
}

#[test]
fn what_may_not_be_meant_is_said() {
    let check = |rule: &str, expected: usize| {
        let rules = Rules::parse(&format!("[[require]]\n{rule}")).unwrap();
        assert_eq!(rules.warnings().len(), expected, "{rule}: {:?}", rules.warnings());
    };
    check("that = 'node.usd <= request.max_usd'", 1);
    check("that = 'node.usd <= request.max_usd'\nwhen = 'has(request.max_usd)'", 0);
    check("that = '!has(request.max_usd) || node.usd <= request.max_usd'", 0);
}

#[test]
fn budgets_are_read() {
    let text = "[[budget]]\nkey = 'alice'\nusd_per_day = 2.5\ntokens_per_min = 1000\n[[budget]]\ntag = 'team'\nusd_per_month = 100\n\
                [[budget]]\neverybody = true\nrequests_per_min = 60";
    let rules = Rules::parse(text).unwrap();
    let first = &rules.allowances[0];
    assert_eq!((first.nano_usd_per_day, first.tokens_per_min), (Some(2_500_000_000), Some(1000)));
    assert_eq!(rules.allowances.len(), 3);
}

/// The names that the parser knows at a place, by its own word about one that it doesn't.
fn known(text: &str) -> Vec<String> {
    let message = Rules::parse(text).expect_err("it knows no such name").0[0].message.clone();
    let mut names: Vec<String> = message.split('`').skip(3).step_by(2).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn the_schema_knows_what_the_parser_knows() {
    let schema = schema();
    let check = |pointer: &str, text: &str| {
        let properties = schema.pointer(pointer).unwrap_or_else(|| panic!("{pointer}"));
        let mut names: Vec<String> = properties.as_object().unwrap().keys().cloned().collect();
        names.sort();
        assert_eq!(names, known(text), "{text}");
    };
    check("/properties", "zzzzzz = 1");
    for rule in ["require", "deny", "prefer", "override", "budget"] {
        check(&format!("/properties/{rule}/items/properties"), &format!("[[{rule}]]\nzzzzzz = 1"));
    }
    check("/properties/objective/properties", "[objective]\nzzzzzz = 1");
    check("/properties/spill/properties", "[spill]\nzzzzzz = 1");
    check(
        "/properties/override/items/properties/set/properties",
        "[[override]]\nwhen = 'true'\nset = { zzzzzz = 1 }",
    );
}
