use super::*;
use crate::Attribute;
use proptest::prelude::*;
use serde_json::{Map, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

const NOW_MS: i64 = 1_700_000_000_999;

fn rule(rule: &Value) -> Rule {
    Rule::compile(rule, &Evaluators::default()).unwrap().unwrap()
}

/// What `logic` is, spelled as JSON: through `===` with the expected value, as only names come out of a rule.
fn is(logic: &Value, expected: &Value, data: &Value) -> bool {
    let attributes: Vec<_> =
        data.as_object().unwrap().iter().map(|(name, value)| (name.as_str(), Attribute::Json(value))).collect();
    let request = Request { flag_key: "a-flag", now_ms: NOW_MS, context: Context::new(&attributes).with_key("a-user") };
    rule(&json!({"===": [logic, expected]})).evaluate(&request).unwrap().as_deref() == Some("true")
}

#[rstest::rstest]
#[case::var(json!({"var": "text"}), json!("hello"))]
#[case::var_in_a_list(json!({"var": ["text"]}), json!("hello"))]
#[case::var_nested(json!({"var": "user.address.city"}), json!("Graz"))]
#[case::var_index(json!({"var": "list.1"}), json!(2))]
#[case::var_index_with_a_zero(json!({"var": "list.01"}), json!(null))]
#[case::var_index_with_a_sign(json!({"var": "list.+1"}), json!(null))]
#[case::var_no_index(json!({"var": "list.x"}), json!(null))]
#[case::var_absent(json!({"var": "user.none.city"}), json!(null))]
#[case::var_default(json!({"var": ["none", 7]}), json!(7))]
#[case::var_default_unused(json!({"var": ["text", 7]}), json!("hello"))]
#[case::var_computed(json!({"var": {"cat": ["te", "xt"]}}), json!("hello"))]
#[case::targeting_key(json!({"var": "targetingKey"}), json!("a-user"))]
#[case::flag_key(json!({"var": "$flagd.flagKey"}), json!("a-flag"))]
#[case::timestamp(json!({"var": "$flagd.timestamp"}), json!(1_700_000_000))]
#[case::timestamp_computed(json!({"var": {"cat": ["$flagd.", "timestamp"]}}), json!(1_700_000_000))]
#[case::missing(json!({"missing": ["text", "none", "empty"]}), json!(["none", "empty"]))]
#[case::missing_merged(json!({"missing": {"merge": ["none", ["text"]]}}), json!(["none"]))]
#[case::missing_some_enough(json!({"missing_some": [1, ["text", "none"]]}), json!([]))]
#[case::missing_some(json!({"missing_some": [2, ["text", "none"]]}), json!(["none"]))]
#[case::if_then(json!({"if": [true, "a", "b"]}), json!("a"))]
#[case::if_else(json!({"if": [false, "a", "b"]}), json!("b"))]
#[case::if_elseif(json!({"if": [false, "a", 1, "b", "c"]}), json!("b"))]
#[case::if_without_else(json!({"if": [false, "a"]}), json!(null))]
#[case::ternary(json!({"?:": ["", "a", "b"]}), json!("b"))]
#[case::loose_text_number(json!({"==": ["1", 1]}), json!(true))]
#[case::loose_bool_number(json!({"==": [true, 1]}), json!(true))]
#[case::loose_null_zero(json!({"==": [null, 0]}), json!(false))]
#[case::loose_null_null(json!({"==": [{"var": "none"}, null]}), json!(true))]
#[case::loose_no_number(json!({"==": ["abc", 0]}), json!(false))]
#[case::loose_empty(json!({"==": ["", 0]}), json!(true))]
#[case::loose_list_text(json!({"==": [[1, 2], "1,2"]}), json!(true))]
#[case::strict_kinds(json!({"===": ["1", 1]}), json!(false))]
#[case::strict_numbers(json!({"===": [1, 1.0]}), json!(true))]
#[case::strict_lists(json!({"===": [{"var": "list"}, [1, 2.0, 3]]}), json!(true))]
#[case::not_equal(json!({"!=": [1, "1"]}), json!(false))]
#[case::not_same(json!({"!==": [1, "1"]}), json!(true))]
#[case::not(json!({"!": [""]}), json!(true))]
#[case::not_alone(json!({"!": {"var": "none"}}), json!(true))]
#[case::not_text_zero(json!({"!": "0"}), json!(false))]
#[case::not_empty_list(json!({"!": [[]]}), json!(true))]
#[case::truth(json!({"!!": [{"var": "user"}]}), json!(true))]
#[case::and_first_false(json!({"and": [1, 0, "x"]}), json!(0))]
#[case::and_last(json!({"and": [1, "x"]}), json!("x"))]
#[case::or_first_true(json!({"or": [0, "x", 1]}), json!("x"))]
#[case::or_last(json!({"or": [0, ""]}), json!(""))]
#[case::less(json!({"<": [1, 2]}), json!(true))]
#[case::less_text_as_number(json!({"<": ["2", 10]}), json!(true))]
#[case::less_texts(json!({"<": ["2", "10"]}), json!(false))]
#[case::less_no_number(json!({"<": ["x", 10]}), json!(false))]
#[case::less_null(json!({"<": [null, 1]}), json!(true))]
#[case::between(json!({"<": [1, 5, 10]}), json!(true))]
#[case::not_between(json!({"<": [1, 10, 10]}), json!(false))]
#[case::between_or_equal(json!({"<=": [1, 10, 10]}), json!(true))]
#[case::greater(json!({">": [2, 1]}), json!(true))]
#[case::greater_or_equal(json!({">=": [1, 1.0]}), json!(true))]
#[case::max(json!({"max": [1, "3", 2]}), json!(3))]
#[case::min(json!({"min": [1, -3.5, 2]}), json!(-3.5))]
#[case::max_of_no_number(json!({"<": [{"max": ["x", 1]}, 2]}), json!(false))]
#[case::max_of_no_number_last(json!({"<": [{"max": [1, "x"]}, 2]}), json!(false))]
#[case::min_of_no_number(json!({"<": [{"min": ["x", 1]}, 2]}), json!(false))]
#[case::min_of_no_number_last(json!({"<": [{"min": [1, "x"]}, 2]}), json!(false))]
#[case::plus(json!({"+": [1, "2", 3.5]}), json!(6.5))]
#[case::plus_alone(json!({"+": "3.5"}), json!(3.5))]
#[case::minus(json!({"-": [5, 7]}), json!(-2))]
#[case::negate(json!({"-": 5}), json!(-5))]
#[case::times(json!({"*": [2, 3, 4]}), json!(24))]
#[case::divide(json!({"/": [6, 3]}), json!(2))]
#[case::divide_uneven(json!({"/": [1, 2]}), json!(0.5))]
#[case::modulo(json!({"%": [7, 3]}), json!(1))]
#[case::modulo_negative(json!({"%": [-7, 3]}), json!(-1))]
#[case::overflow(json!({"+": [i64::MAX, 1]}), json!(9_223_372_036_854_775_808.0))]
#[case::by_zero(json!({"<": [1, {"/": [1, 0]}]}), json!(true))]
#[case::rest_of_zero(json!({"!": {"%": [1, 0]}}), json!(true))]
#[case::in_text(json!({"in": ["ell", {"var": "text"}]}), json!(true))]
#[case::in_list(json!({"in": [2, {"var": "list"}]}), json!(true))]
#[case::in_list_kind(json!({"in": ["2", {"var": "list"}]}), json!(false))]
#[case::in_literal(json!({"in": [{"var": "text"}, ["hi", "hello"]]}), json!(true))]
#[case::in_nothing(json!({"in": ["x", {"var": "none"}]}), json!(false))]
#[case::nothing_in(json!({"in": [{"var": "none"}, "null"]}), json!(false))]
#[case::number_in_text(json!({"in": [2, "123"]}), json!(true))]
#[case::cat(json!({"cat": ["a", 1, 2.5, true, null, [1, [2]]]}), json!("a12.5true1,2"))]
#[case::cat_large_and_small(json!({"cat": [1e21, " ", 1.5e21, " ", 1e20, " ", 1e-7, " ", 0.000_001, " ", -2.5e-9]}), json!("1e+21 1.5e+21 100000000000000000000 1e-7 0.000001 -2.5e-9"))]
#[case::cat_minus_zero(json!({"cat": [{"*": [-1, 0.0]}]}), json!("0"))]
#[case::substr(json!({"substr": ["jsonlogic", 4]}), json!("logic"))]
#[case::substr_from_end(json!({"substr": ["jsonlogic", -5]}), json!("logic"))]
#[case::substr_length(json!({"substr": ["jsonlogic", 1, 3]}), json!("son"))]
#[case::substr_without_end(json!({"substr": ["jsonlogic", 4, -2]}), json!("log"))]
#[case::substr_beyond(json!({"substr": ["json", 9, 3]}), json!(""))]
#[case::substr_crossed(json!({"substr": ["json", 3, -3]}), json!(""))]
#[case::substr_characters(json!({"substr": ["für", 1, 1]}), json!("ü"))]
#[case::merge(json!({"merge": [[1], 2, [3, [4]]]}), json!([1, 2, 3, [4]]))]
#[case::map(json!({"map": [{"var": "list"}, {"*": [{"var": ""}, 2]}]}), json!([2, 4, 6]))]
#[case::filter(json!({"filter": [{"var": "list"}, {">": [{"var": ""}, 1]}]}), json!([2, 3]))]
#[case::reduce(
    json!({"reduce": [{"var": "list"}, {"+": [{"var": "current"}, {"var": "accumulator"}]}, 10]}),
    json!(16)
)]
#[case::all(json!({"all": [{"var": "list"}, {">": [{"var": ""}, 0]}]}), json!(true))]
#[case::all_of_nothing(json!({"all": [[], true]}), json!(false))]
#[case::some(json!({"some": [{"var": "people"}, {"==": [{"var": "name"}, "Bo"]}]}), json!(true))]
#[case::none(json!({"none": [{"var": "list"}, {">": [{"var": ""}, 3]}]}), json!(true))]
#[case::over_no_list(json!({"map": [{"var": "text"}, 1]}), json!([]))]
#[case::starts_with(json!({"starts_with": [{"var": "text"}, "he"]}), json!(true))]
#[case::ends_with(json!({"ends_with": [{"var": "text"}, "he"]}), json!(false))]
#[case::ends_with_number(json!({"ends_with": [{"+": [12]}, "2"]}), json!(null))]
#[case::sem_ver(json!({"sem_ver": [{"var": "version"}, ">=", "1.2"]}), json!(true))]
#[case::sem_ver_no_version(json!({"sem_ver": [{"var": "text"}, ">=", "1.2"]}), json!(null))]
#[case::sem_ver_number(json!({"sem_ver": [1.5, "=", "1.5.0"]}), json!(true))]
#[case::literal_list(json!([1, "a", [true]]), json!([1, "a", [true]]))]
#[case::fraction_of_nothing(json!({"fractional": [{"var": "none"}, ["a", 1]]}), json!(null))]
#[case::fraction_of_one(json!({"fractional": [{"var": "text"}, ["a", 0], ["b"]]}), json!("b"))]
#[case::fraction_below_zero(json!({"fractional": [["a", -5], ["b", {"-": 3}], ["c", 1.0]]}), json!("c"))]
#[case::fraction_no_weight(json!({"fractional": [["a", {"var": "text"}], ["c", 1]]}), json!(null))]
#[case::fraction_computed_to_nothing(json!({"fractional": [["a", {"-": 1}]]}), json!(null))]
#[case::fraction_computed_too_large(json!({"fractional": [["a", {"+": [2_147_483_647, 1]}]]}), json!(null))]
#[case::fraction_without_variant(json!({"fractional": [[null, 1]]}), json!(null))]
#[case::fraction_with_a_computed_bucket(json!({"fractional": [{"merge": ["a", 1]}, ["a", 1]]}), json!("a"))]
#[case::fraction_with_a_computed_bucket_of_nothing(json!({"fractional": [{"merge": ["a", 0]}, ["b", 1]]}), json!("b"))]
#[case::fraction_with_a_computed_bucket_without_a_weight(json!({"fractional": [{"merge": ["a"]}, ["a", 1]]}), json!("a"))]
#[case::fraction_with_a_computed_bucket_too_large(json!({"fractional": [{"merge": ["a", 2_147_483_647]}, ["b", 1]]}), json!(null))]
#[case::fraction_by_a_list(json!({"fractional": [{"var": "list"}, ["a", 1]]}), json!(null))]
fn operators(#[case] logic: Value, #[case] expected: Value) {
    let data = json!({
        "text": "hello", "empty": "", "version": "v1.10.0", "list": [1, 2, 3],
        "user": {"address": {"city": "Graz"}}, "people": [{"name": "Al"}, {"name": "Bo"}],
    });
    assert!(is(&logic, &expected, &data));
}

#[rstest::rstest]
#[case::text(json!({"var": "x"}), Ok(Some("red")))]
#[case::made_text(json!({"cat": ["r", "ed"]}), Ok(Some("red")))]
#[case::yes(json!({"ends_with": [{"var": "x"}, "ed"]}), Ok(Some("true")))]
#[case::no(json!({"ends_with": [{"var": "x"}, "en"]}), Ok(Some("false")))]
#[case::null(json!({"var": "y"}), Ok(None))]
#[case::number(json!({"+": [1, 2]}), Err(EvaluationError::NoName("number")))]
#[case::list(json!({"merge": [1, 2]}), Err(EvaluationError::NoName("list or object")))]
fn answers(#[case] logic: Value, #[case] expected: Result<Option<&str>, EvaluationError>) {
    let rule = rule(&logic);
    let context = Context::new(&[("x", Attribute::Text("red"))]);
    let answer = rule.evaluate(&Request { flag_key: "f", now_ms: 0, context });
    assert_eq!(answer.as_ref().map(Option::as_deref), expected.as_ref().map(|name| *name));
}

#[rstest::rstest]
#[case(json!({"vra": "x"}), "targeting.vra: vra is not an operator")]
#[case(json!({"if": [{"iff": []}, "a"]}), "targeting.if[0].iff: iff is not an operator")]
#[case(json!({"var": "a", "==": 1}), "targeting: must be an operation, an object with exactly one member; it has 2")]
#[case(json!({"if": [{}, "a"]}), "targeting.if[0]: must be an operation, an object with exactly one member; it has 0")]
#[case(json!({"==": [1]}), "targeting.==: takes two values, found 1")]
#[case(json!({"!": [1, 2]}), "targeting.!: takes one value, found 2")]
#[case(json!({"map": [[1]]}), "targeting.map: takes a list, and what is asked of each item, found 1")]
#[case(json!({"var": ""}), "targeting.var: names no attribute")]
#[case(json!({"var": "$flagd.time"}), "targeting.var: only $flagd.flagKey and $flagd.timestamp exist")]
#[case(json!({"var": true}), "targeting.var: needs the name of an attribute")]
#[case(json!({"sem_ver": [{"var": "v"}, "==", "1.0.0"]}), "targeting.sem_ver[1]: must be one of =")]
#[case(json!({"sem_ver": [{"var": "v"}, "=", "one"]}), "targeting.sem_ver[2]: must be a version")]
#[case(json!({"sem_ver": [null, "=", "1.0.0"]}), "targeting.sem_ver[0]: must be a version")]
#[case(json!({"starts_with": [{"var": "v"}, 12]}), "targeting.starts_with[1]: must be a text")]
#[case(json!({"ends_with": [["a"], {"var": "v"}]}), "targeting.ends_with[0]: must be a text")]
#[case(json!({"fractional": [{"var": "v"}]}), "targeting.fractional: needs buckets")]
#[case(json!({"fractional": []}), "targeting.fractional: needs buckets")]
#[case(json!({"fractional": [{"var": "v"}, "a", 10]}), "targeting.fractional[1]: must be a list of a variant")]
#[case(json!({"fractional": [["a", 0.5]]}), "targeting.fractional[0][1]: must be a whole number")]
#[case(json!({"fractional": [["a", "1"]]}), "targeting.fractional[0][1]: must be a whole number")]
#[case(json!({"fractional": [["a", 0], ["b", -1]]}), "targeting.fractional: needs a weight above 0")]
#[case(json!({"fractional": [["a", 2_147_483_647], ["b"]]}), "targeting.fractional: the weights must not add up")]
#[case(json!({"fractional": [[["a"], 1]]}), "targeting.fractional[0][0]: must be the name of a variant")]
#[case(json!({"$ref": "nobody"}), "targeting.$ref: nobody is not among $evaluators (bad, ping, pong, positive, vip)")]
#[case(json!({"!": {"$ref": "ping"}}), "$evaluators.pong.!.$ref: refers to itself: ping -> pong -> ping;")]
#[case(json!({"!": {"$ref": "bad"}}), "$evaluators.bad.in: takes two values, found 1")]
fn mistakes_are_named_with_their_place(#[case] logic: Value, #[case] expected: &str) {
    let error = Rule::compile(&logic, &evaluators()).unwrap_err().to_string();
    assert!(error.starts_with(expected), "{error}");
}

fn evaluators() -> Evaluators {
    let all = json!({
        "vip": {"ends_with": [{"var": "email"}, "@vip.example"]},
        "ping": {"or": [{"$ref": "vip"}, {"$ref": "pong"}]},
        "pong": {"!": {"$ref": "ping"}},
        "bad": {"in": ["x"]},
        "positive": {">": [{"var": ""}, 0]},
    });
    shared(&all)
}

fn shared(rules: &Value) -> Evaluators {
    Evaluators::compile(rules.as_object().unwrap())
}

/// Of the second version flagd-core 4.0.1 for Node has these answers.
#[rstest::rstest]
#[case::shorthand(json!([["red", 50], ["green", 50]]), "user-1", "green")]
#[case::shorthand_of_another(json!([["red", 50], ["green", 50]]), "user-2", "red")]
#[case::text(json!([{"var": "email"}, ["red", 50], ["green", 50]]), "user-1", "green")]
#[case::computed_text(json!([{"cat": [{"var": "email"}, "!"]}, ["red", 50], ["green", 50]]), "user-1", "red")]
#[case::computed_bucket(json!([{"merge": ["red", 50]}, ["green", 50]]), "user-2", "red")]
#[case::number(json!([{"var": "number"}, ["red", 50], ["green", 50]]), "user-1", "-")]
#[case::no_key(json!([["red", 50], ["green", 50]]), "", "-")]
fn the_second_fractional_is_there_by_name(#[case] split: Value, #[case] key: &str, #[case] expected: &str) {
    let rule = rule(&json!({ FRACTIONAL_V2: split }));
    let attributes = [("email", Attribute::Text("alice@example.com")), ("number", Attribute::Integer(7))];
    let request = Request { flag_key: "flag", now_ms: 0, context: Context::new(&attributes).with_key(key) };
    assert_eq!(rule.evaluate(&request).unwrap().as_deref().unwrap_or("-"), expected);
}

#[test]
fn shared_rules_are_resolved_when_compiled() {
    let rule = Rule::compile(&json!({"if": [{"$ref": "vip"}, "red", null]}), &evaluators()).unwrap().unwrap();
    let answer = |email| {
        let context = [("email", Attribute::Text(email))];
        let request = Request { flag_key: "f", now_ms: 0, context: Context::new(&context) };
        rule.evaluate(&request).unwrap().map(Cow::into_owned)
    };
    assert_eq!((answer("a@vip.example").as_deref(), answer("a@example").as_deref()), (Some("red"), None));
    // `positive` is for the items of a list.
    let errors: Vec<_> = evaluators().errors().map(|(name, error)| (name.to_owned(), error.path.clone())).collect();
    let expected =
        [("bad", "$evaluators.bad.in"), ("ping", "$evaluators.pong.!.$ref"), ("pong", "$evaluators.pong.!.$ref")];
    assert_eq!(errors, expected.map(|(name, path)| (name.to_owned(), path.to_owned())));
}

#[rstest::rstest]
#[case::outside(json!({"!": {"$ref": "positive"}}), Some("$evaluators.positive.>[0].var: names no attribute"))]
#[case::inside(json!({"all": [{"var": "l"}, {"$ref": "positive"}]}), None)]
#[case::through_another_one(json!({"$ref": "negative"}), Some("$evaluators.positive.>[0].var: names no attribute"))]
#[case::inside_of_another_one(json!({"$ref": "each"}), None)]
fn a_shared_rule_for_items_stands_inside_only(#[case] logic: Value, #[case] expected: Option<&str>) {
    let evaluators = shared(&json!({
        "positive": {">": [{"var": ""}, 0]},
        "negative": {"!": {"$ref": "positive"}},
        "each": {"all": [{"var": "l"}, {"$ref": "negative"}]},
    }));
    let error = Rule::compile(&logic, &evaluators).err().map(|error| error.to_string());
    assert_eq!(error.is_some(), expected.is_some(), "{error:?}");
    assert!(error.unwrap_or_default().starts_with(expected.unwrap_or_default()));
}

/// What a person is told of at once makes only its own operation null in a pod that has to make do with it.
#[rstest::rstest]
#[case::version(json!({"sem_ver": [{"var": "v"}, "=", "one"]}))]
#[case::comparison(json!({"sem_ver": [{"var": "v"}, "==", "1.0.0"]}))]
#[case::version_that_is_true(json!({"sem_ver": [{"var": "v"}, "=", true]}))]
#[case::starts_with_a_number(json!({"starts_with": [{"var": "v"}, 1]}))]
#[case::ends_with_null(json!({"ends_with": [null, {"var": "v"}]}))]
#[case::no_buckets(json!({"fractional": [{"var": "v"}]}))]
#[case::nothing(json!({"fractional": []}))]
#[case::no_list(json!({"fractional": [{"var": "v"}, "a", 10]}))]
#[case::part_of_a_weight(json!({"fractional": [["a", 0.5]]}))]
#[case::text_as_a_weight(json!({"fractional": [["a", "1"]]}))]
#[case::no_weight(json!({"fractional": [["a", 0]]}))]
#[case::too_much_weight(json!({"fractional": [["a", 2_147_483_647], ["b"]]}))]
#[case::list_as_a_variant(json!({"fractional": [[["a"], 1]]}))]
fn an_operation_without_use_is_refused_or_null(#[case] logic: Value) {
    let rule = json!({"if": [logic, "red", "green"]});
    assert!(Rule::compile(&rule, &Evaluators::default()).is_err());
    let lenient = Evaluators::compile_leniently(&BTreeMap::from([("it".to_owned(), logic)]));
    assert!(lenient.errors().next().is_none());
    let context = [("v", Attribute::Text("1.0.0"))];
    let request = Request { flag_key: "f", now_ms: 0, context: Context::new(&context).with_key("k") };
    for rule in [rule, json!({"if": [{"$ref": "it"}, "red", "green"]})] {
        let rule = rule_with(&rule, &lenient);
        assert_eq!(rule.evaluate(&request).unwrap().as_deref(), Some("green"));
    }
}

#[test]
fn a_person_is_told_of_all_mistakes_in_a_rule() {
    let logic = json!({"if": [
        {"vra": "x"},
        {"sem_ver": [true, "==", "one"]},
        {"fractional": [{"var": ["a", "b", "c"]}, [["x"], 0.5], "y"]},
        {"all": [{"iff": 1}, {"==": [{"var": ""}]}]},
        {"reduce": [{"in": []}, {"var": "current"}, {"!": []}]},
        {"var": ""},
    ]});
    let reviewed = Rule::review(&logic, &Evaluators::default());
    let mut paths: Vec<_> = reviewed.mistakes.iter().map(|error| error.path.as_str()).collect();
    assert_eq!(paths[0], Rule::compile(&logic, &Evaluators::default()).unwrap_err().path);
    paths.sort_unstable();
    let expected = [
        "targeting.if[0].vra",
        "targeting.if[1].sem_ver[0]",
        "targeting.if[1].sem_ver[1]",
        "targeting.if[1].sem_ver[2]",
        "targeting.if[2].fractional[0].var",
        "targeting.if[2].fractional[1][0]",
        "targeting.if[2].fractional[1][1]",
        "targeting.if[2].fractional[2]",
        "targeting.if[3].all[0].iff",
        "targeting.if[3].all[1].==",
        "targeting.if[4].reduce[0].in",
        "targeting.if[4].reduce[2].!",
        // Outside of a list, although a list with a mistake stands before it.
        "targeting.if[5].var",
    ];
    assert_eq!(paths, expected);
    assert!(reviewed.rule.is_none());
    let evaluators = shared(&json!({"broken": {"or": [{"in": []}, {"vra": "x"}]}, "sound": true}));
    let paths: Vec<_> = evaluators.mistakes().map(|error| error.path.as_str()).collect();
    assert_eq!(paths, ["$evaluators.broken.or[0].in", "$evaluators.broken.or[1].vra"]);
}

#[test]
fn mistakes_are_bounded_and_the_bound_is_one_of_them() {
    let many = json!({"or": vec![json!({"$ref": "bad"}); 1_000]});
    assert_eq!(Rule::review(&many, &evaluators()).mistakes.len(), 1, "the same again is nothing new");
    let different: Vec<_> = (0..1_000).map(|nth| json!({ format!("v{nth}"): "x" })).collect();
    assert_eq!(Rule::review(&json!({"or": different}), &Evaluators::default()).mistakes.len(), 21);
    let large = json!({"or": vec![json!({"vra": "x"}), json!(vec![1; MAX_NODES]), json!({"in": []})]});
    let mistakes = Rule::review(&large, &Evaluators::default()).mistakes;
    assert!(matches!(mistakes[0].mistake, Mistake::UnknownOperator(_)), "{mistakes:?}");
}

#[test]
fn of_very_many_wrong_shared_rules_the_rest_is_not_looked_at() {
    let rules = |count: usize| {
        let wrong = (0..count).map(|nth| (format!("r{nth:04}"), json!({"in": [nth]})));
        Value::Object(wrong.chain([("sound".to_owned(), json!(true))]).collect())
    };
    for (count, looked_at) in [(0, 0), (199, 199), (200, 200), (5_000, 200)] {
        let rules = rules(count);
        let evaluators = shared(&rules);
        assert_eq!((evaluators.errors().count(), evaluators.is_complete()), (looked_at, count < 200));
        let lenient = Evaluators::compile_leniently(rules.as_object().unwrap());
        assert_eq!((lenient.errors().count(), lenient.is_complete()), (count, true), "a pod takes what there is");
    }
}

#[rstest::rstest]
#[case::text(json!({"fractional": ["email", ["red", 1], ["green", 1]]}), &["targeting.fractional[0]"])]
#[case::number(json!({"if": [true, {"fractional": [7, ["red", 1]]}]}), &["targeting.if[1].fractional[0]"])]
#[case::attribute(json!({"fractional": [{"var": "email"}, ["red", 1], ["green", 1]]}), &[])]
#[case::none(json!({"fractional": [["red", 1], ["green", 1]]}), &[])]
fn a_constant_bucketing_value_is_a_warning(#[case] logic: Value, #[case] expected: &[&str]) {
    let reviewed = Rule::review(&logic, &Evaluators::default());
    assert!(reviewed.rule.is_some() && reviewed.mistakes.is_empty());
    assert_eq!(reviewed.warnings.iter().map(|warning| warning.path.as_str()).collect::<Vec<_>>(), expected);
    let shared = shared(&json!({ "it": logic }));
    assert_eq!(shared.warnings().count(), expected.len());
}

/// An error inside of a shared rule is one of that rule, whatever its name, and the places after it are right.
#[test]
fn a_mistake_in_a_shared_rule_leaves_the_place_as_it_was() {
    let evaluators = shared(&json!({"a": {"!": {"$ref": "ü"}}, "ü": {"in": ["x"]}, "é": {"$ref": "none"}}));
    for logic in [json!({"$ref": "ü"}), json!({"if": [{"$ref": "a"}, "x"]})] {
        let error = Rule::compile(&logic, &evaluators).unwrap_err();
        assert_eq!(error.to_string(), "$evaluators.ü.in: takes two values, found 1");
    }
    let error = Rule::compile(&json!({"or": [true, {"$ref": "é"}]}), &evaluators).unwrap_err();
    assert_eq!(error.path, "$evaluators.é.$ref");
}

/// However often they refer to each other, and in however long a chain.
#[test]
fn shared_rules_are_compiled_once() {
    let doubling = |nth: u32| {
        let before = json!({ "$ref": format!("r{:04}", nth - 1) });
        json!({"and": [before, before]})
    };
    let mut rules = BTreeMap::from([("r0000".to_owned(), json!("x".repeat(60_000)))]);
    rules.extend((1..5_500).map(|nth| (format!("r{nth:04}"), doubling(nth))));
    let evaluators = Evaluators::compile(&rules);
    // Only the depth of an evaluation is bounded.
    let deepest = MAX_DEPTH / 2;
    assert_eq!(evaluators.errors().next().unwrap().0, format!("r{:04}", deepest + 1));
    assert_eq!(evaluators.errors().next().unwrap().1.mistake, Mistake::TooDeep);
    let first = rule_with(&json!({"$ref": "r0005"}), &evaluators);
    let second = rule_with(&json!({"$ref": "r0005"}), &evaluators);
    let (Node::Shared(first), Node::Shared(second)) = (&first.root, &second.root) else { panic!("they are shared") };
    assert!(Arc::ptr_eq(first, second));
    let request = Request { flag_key: "f", now_ms: 0, context: Context::EMPTY };
    let deep = rule_with(&json!({"if": [{"$ref": format!("r{:04}", deepest - 1)}, "red"]}), &evaluators);
    assert_eq!(deep.evaluate(&request), Err(EvaluationError::TooMuchWork));
    assert_eq!(deep.named_variants().flatten().collect::<BTreeSet<_>>(), BTreeSet::from(["red"]));
}

fn rule_with(rule: &Value, evaluators: &Evaluators) -> Rule {
    Rule::compile(rule, evaluators).unwrap().unwrap()
}

/// A rule may name thousands of shared ones that are not there, and so may each of hundreds of flags.
#[test]
fn a_message_does_not_grow_with_the_document() {
    let rules: BTreeMap<_, _> = (0..5_000).map(|nth| (format!("r{nth:04}"), json!(true))).collect();
    let evaluators = Evaluators::compile(&rules);
    let long = "ü".repeat(10_000);
    for logic in [json!({"$ref": long}), json!({"$ref": 10}), json!({long: [1]})] {
        let error = Rule::compile(&logic, &evaluators).unwrap_err().to_string();
        assert!(error.len() < 1_000, "{} bytes", error.len());
    }
    let chain: BTreeMap<_, _> =
        (0..3_000).map(|nth| (format!("r{nth:04}"), json!({"$ref": format!("r{:04}", (nth + 1) % 3_000)}))).collect();
    let error = Evaluators::compile(&chain).errors().next().unwrap().1.to_string();
    assert!(error.contains("refers to itself") && error.len() < 1_000, "{error}");
}

#[rstest::rstest]
#[case(json!(null))]
#[case(json!({}))]
fn nothing_is_no_rule(#[case] rule: Value) {
    assert!(Rule::compile(&rule, &Evaluators::default()).unwrap().is_none());
}

/// The tenth that a number falls into, of its own digits. Computed outside of this program, by the rule: MurmurHash3 (x86, 32
/// bits, seed 0) of the byte 0x1b and the number's eight bytes, times 100, divided by 2^32.
#[rstest::rstest]
#[case(i64::MAX.unsigned_abs(), "2")]
#[case(1 << 63, "6")]
#[case((1 << 63) + 1, "9")]
#[case((1 << 63) + 2, "0")]
#[case(u64::MAX - 1, "2")]
#[case(u64::MAX, "4")]
fn large_numbers_are_bucketed_by_all_of_their_digits(#[case] number: u64, #[case] tenth: &str) {
    let split = |by: Value| {
        let buckets = (0..10).map(|tenth| json!([tenth.to_string(), 10]));
        let parts: Vec<_> = [by].into_iter().chain(buckets).collect();
        json!({ "fractional": parts })
    };
    let data = json!({ "id": number, "ids": [number] });
    for by in [json!({"var": "id"}), json!({"var": "ids.0"}), json!({"if": [true, number]}), json!(number)] {
        assert!(is(&split(by.clone()), &json!(tenth), &data), "{by}");
    }
    assert!(is(&json!({"==": [{"var": "id"}, number]}), &json!(true), &data));
    assert!(is(&json!({">": [{"var": "id"}, 9.0e18]}), &json!(true), &data), "compared as a float");
}

#[rstest::rstest]
#[case(json!({"<": [{"var": "$flagd.timestamp"}, 5]}), true)]
#[case(json!({"var": {"var": "which"}}), true)]
#[case(json!({"fractional": [{"var": "$flagd.flagKey"}, ["a"]]}), false)]
fn only_some_rules_need_a_clock(#[case] logic: Value, #[case] expected: bool) {
    assert_eq!(rule(&logic).uses_time(), expected);
}

#[test]
fn the_variants_that_a_rule_names_are_known() {
    let logic = json!({"if": [
        {"==": [{"var": "x"}, "no"]}, "red",
        {"var": "no"}, {"fractional": [["green", 1], [{"if": ["no", "blue"]}, 1]]},
        true,
    ]});
    assert_eq!(
        rule(&logic).named_variants().flatten().collect::<BTreeSet<_>>(),
        BTreeSet::from(["red", "green", "blue", "true"])
    );
}

#[test]
fn depth_and_size_of_a_rule_are_bounded() {
    let nested = |depth| (0..depth).fold(json!("x"), |inner, _| json!({"!": inner}));
    let compile = |rule: &Value, evaluators: &Evaluators| {
        Rule::compile(rule, evaluators).map(|_| ()).map_err(|error| error.mistake)
    };
    assert_eq!(compile(&nested(MAX_DEPTH), &Evaluators::default()), Ok(()));
    assert_eq!(compile(&nested(MAX_DEPTH + 1), &Evaluators::default()), Err(Mistake::TooDeep));
    let half = shared(&json!({"half": nested(MAX_DEPTH / 2)}));
    let on_top = |depth| (0..depth).fold(json!({"$ref": "half"}), |inner, _| json!({"!": inner}));
    assert_eq!(compile(&on_top(MAX_DEPTH / 2 - 1), &half), Ok(()));
    assert_eq!(compile(&on_top(MAX_DEPTH / 2), &half), Err(Mistake::TooDeep));
    assert_eq!(compile(&json!({"in": ["x", vec!["y"; MAX_NODES]]}), &half), Err(Mistake::TooLarge));
}

#[rstest::rstest]
#[case::lists_in_lists(
    json!({"all": [{"var": "l"}, {"all": [[1, 2, 3, 4, 5, 6, 7, 8], {">": [{"var": ""}, 0]}]}]}),
    EvaluationError::TooMuchWork
)]
#[case::doubling_text(
    json!({"reduce": [{"var": "l"}, {"cat": [{"var": "accumulator"}, {"var": "accumulator"}]}, "text"]}),
    EvaluationError::TooMuchMade
)]
#[case::doubling_list(
    json!({"reduce": [{"var": "l"}, {"merge": [{"var": "accumulator"}, {"var": "accumulator"}]}, [1, 2]]}),
    EvaluationError::TooMuchMade
)]
#[case::doubling_nesting(
    json!({"reduce": [{"var": "l"}, [{"var": "accumulator"}, {"var": "accumulator"}], 1]}),
    EvaluationError::TooDeep
)]
#[case::a_small_tree_that_is_large_when_spelled(
    json!({"cat": {"reduce": [{"merge": [vec![1; 50]]}, [{"var": "accumulator"}, {"var": "accumulator"}], 1]}}),
    EvaluationError::TooMuchWork
)]
#[case::a_small_tree_that_is_large_when_compared(
    json!({"===": [
        {"reduce": [{"merge": [vec![1; 50]]}, [{"var": "accumulator"}, {"var": "accumulator"}], 1]},
        {"reduce": [{"merge": [vec![1; 50]]}, [{"var": "accumulator"}, {"var": "accumulator"}], 1]},
    ]}),
    EvaluationError::TooMuchWork
)]
#[case::a_small_tree_that_is_no_version(
    json!({"sem_ver": [
        {"reduce": [{"merge": [vec![1; 50]]}, [{"var": "accumulator"}, {"var": "accumulator"}], 1]}, "=", "1.0.0"
    ]}),
    EvaluationError::TooMuchWork
)]
fn work_is_bounded(#[case] logic: Value, #[case] expected: EvaluationError) {
    let list = json!(vec![1; 20_000]);
    let context = [("l", Attribute::Json(&list))];
    let request = Request { flag_key: "f", now_ms: 0, context: Context::new(&context) };
    assert_eq!(rule(&logic).evaluate(&request), Err(expected));
}

/// What openfeature-flagd-core 2.0.0 (Python) answers: rule, key, `w` and variant. A rule with the shorthand gets the
/// key as targeting key.
#[test]
fn splits_are_those_of_flagd() {
    let vectors: Value = serde_json::from_str(include_str!("vectors.json")).unwrap();
    let rules: Map<_, _> = vectors["rules"].as_object().unwrap().clone();
    let rules: BTreeMap<_, _> = rules.iter().map(|(name, logic)| (name.as_str(), rule(logic))).collect();
    let mut wrong = String::new();
    for case in vectors["cases"].as_array().unwrap() {
        let [name, key, weight] = [0, 1, 2].map(|at| &case[at]);
        let attributes = [("key", Attribute::Json(key)), ("w", Attribute::Json(weight))];
        let context =
            if weight.is_null() { Context::EMPTY.with_key(key.as_str().unwrap()) } else { Context::new(&attributes) };
        let name = name.as_str().unwrap();
        let answer = rules[name].evaluate(&Request { flag_key: name, now_ms: 0, context }).unwrap();
        if answer.as_deref() != case[3].as_str() {
            writeln!(wrong, "{case} is {answer:?}").unwrap();
        }
    }
    assert_eq!(wrong, "");
}

fn any_json() -> impl Strategy<Value = Value> {
    let name = prop_oneof![
        Just("var"),
        Just("if"),
        Just("=="),
        Just("==="),
        Just("<"),
        Just("+"),
        Just("-"),
        Just("/"),
        Just("%"),
        Just("in"),
        Just("cat"),
        Just("substr"),
        Just("missing"),
        Just("missing_some"),
        Just("merge"),
        Just("map"),
        Just("filter"),
        Just("reduce"),
        Just("all"),
        Just("some"),
        Just("and"),
        Just("!"),
        Just("max"),
        Just("sem_ver"),
        Just("ends_with"),
        Just("fractional"),
        Just("$ref"),
    ];
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3_i64..4).prop_map(Value::from),
        prop_oneof![Just("a"), Just("a.b"), Just("vip"), Just("1.2.3"), Just("ü水"), Just("")].prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 4, move |inner| {
        let list = proptest::collection::vec(inner, 0..4);
        prop_oneof![
            list.clone().prop_map(Value::from),
            (name.clone(), list).prop_map(|(name, arguments)| json!({ name: arguments })),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_rule_is_refused_or_evaluated_the_same_way_each_time(logic in any_json(), data in any_json()) {
        if let Ok(Some(rule)) = Rule::compile(&logic, &evaluators()) {
            let attributes = [("a", Attribute::Json(&data)), ("email", Attribute::Text("x@vip.example"))];
            let request = Request { flag_key: "f", now_ms: NOW_MS, context: Context::new(&attributes).with_key("k") };
            prop_assert_eq!(rule.evaluate(&request), rule.evaluate(&request));
        }
    }

    #[test]
    fn shares_are_kept(keys in 0_u32..1_000_000) {
        let rule = rule(&json!({"fractional": [["a", 10], ["b", 90]]}));
        let keys: Vec<_> = (keys..keys + 2_000).map(|key| format!("user-{key}")).collect();
        let is_a = |key: &&String| {
            let request = Request { flag_key: "f", now_ms: 0, context: Context::EMPTY.with_key(key) };
            rule.evaluate(&request).unwrap().as_deref() == Some("a")
        };
        let share = keys.iter().filter(is_a).count();
        prop_assert!((120..=280).contains(&share), "{} of 2,000", share);
    }
}
