//! The shipped policies do what their tables say.
use weir_policies::{Rules, SHIPPED, Table, shipped};

#[test]
fn shipped_policies_do_what_they_say() {
    for policy in &SHIPPED {
        let rules = Rules::parse(policy.text).unwrap_or_else(|why| panic!("{}: {why}", policy.name));
        assert_eq!(rules.warnings(), [], "{}", policy.name);
        assert!(!rules.about.is_empty());
        let table = Table::parse(policy.table).unwrap_or_else(|why| panic!("{}: {why}", policy.name));
        assert_eq!(table.policy, policy.name);
        assert!(table.cases.len() >= 3);
        let wrong = table.mismatches(policy.table, &rules);
        assert_eq!(wrong, [], "{}", policy.name);
    }
    assert!(shipped("cheapest").is_some() && shipped("other").is_none());
}
