//! Documents of flagd and contexts at random, the same ones for the same seed. Most operations get values of the kinds that they are for;
//! some get anything.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

/// A document, and what is asked about it.
#[derive(Clone, Debug)]
pub struct Case {
    pub document: Value,
    pub asks: Vec<Ask>,
}

/// A question about one flag.
#[derive(Clone, Debug)]
pub struct Ask {
    pub key: String,
    pub type_: &'static str,
    pub context: Value,
}

const FLAGS_OF_A_DOCUMENT: std::ops::RangeInclusive<usize> = 1..=3;
const CONTEXTS_OF_A_DOCUMENT: usize = 3;
/// Deepest nesting of what is made.
const DEPTH: usize = 4;
/// One operation of so many gets values of any kind.
const ANYTHING: u32 = 40;

const TEXTS: [&str; 12] = [
    "AT",
    "DE",
    "alice@staff.example",
    "bob@example.com",
    "",
    "1.2.3",
    "v2.0",
    "10",
    "ü水",
    "true",
    "pro",
    "Alice Liddell",
];
const VERSIONS: [&str; 10] =
    ["1.2.3", "1.2", "2", "v2.0.0", "1.2.3-beta.1", "1.2.3-beta.11", "1.2.3+build.7", "10.0.0", "0.9.9", "no version"];
const TEXT_ATTRIBUTES: [&str; 4] = ["email", "country", "plan", "user.name"];
const NUMBER_ATTRIBUTES: [&str; 3] = ["age", "amount", "user.address.zip"];

/// What makes an attribute.
type Make<'m> = &'m dyn Fn(&mut Generator) -> Value;

pub struct Generator {
    random: StdRng,
}

impl Generator {
    pub fn new(seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed) }
    }

    pub fn case(&mut self) -> Case {
        let mut flags = Map::new();
        let mut types = Vec::new();
        let evaluators: Map<_, _> =
            (0..self.below(3)).map(|nth| (format!("rule-{nth}"), self.condition(2, 0))).collect();
        for nth in 0..self.random.random_range(FLAGS_OF_A_DOCUMENT) {
            let key = format!("flag-{nth}");
            let (type_, flag) = self.flag(evaluators.len());
            types.push((key.clone(), type_));
            flags.insert(key, flag);
        }
        let mut document = json!({ "flags": flags });
        if !evaluators.is_empty() {
            document["$evaluators"] = evaluators.into();
        }
        let mut asks = Vec::new();
        for _ in 0..CONTEXTS_OF_A_DOCUMENT {
            let context = self.context();
            asks.extend(types.iter().map(|(key, type_)| Ask { key: key.clone(), type_, context: context.clone() }));
        }
        Case { document, asks }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random.random_range(0..bound)
    }

    fn one_in(&mut self, count: u32) -> bool {
        self.random.random_ratio(1, count)
    }

    fn pick<T: Clone>(&mut self, among: &[T]) -> T {
        among.choose(&mut self.random).cloned().unwrap_or_else(|| unreachable!("there is something to pick from"))
    }

    fn flag(&mut self, rules: usize) -> (&'static str, Value) {
        let (type_, variants) = match self.below(5) {
            0 => ("string", json!({"red": "#f00", "green": "#0f0", "none": ""})),
            1 => ("number", json!({"low": 1, "high": 250, "less": -7})),
            2 => ("number", json!({"half": 0.5, "more": 2.25, "whole": 3})),
            3 => ("object", json!({"small": {"size": 1}, "large": {"size": [1, 2], "text": "ü"}})),
            _ => ("boolean", json!({"on": true, "off": false, "true": true, "false": false})),
        };
        let names: Vec<String> = variants.as_object().unwrap().keys().cloned().collect();
        let mut flag = json!({"state": "ENABLED", "variants": variants});
        if self.one_in(20) {
            flag["state"] = json!("DISABLED");
        }
        flag["defaultVariant"] = if self.one_in(8) { Value::Null } else { self.pick(&names).into() };
        if !self.one_in(12) {
            flag["targeting"] = self.answer(&names, DEPTH, rules);
        }
        (type_, flag)
    }

    /// Something that answers with a variant, in most cases.
    fn answer(&mut self, names: &[String], depth: usize, rules: usize) -> Value {
        let made = match self.below(10) {
            // What is no operation is no rule.
            0 | 1 if depth < DEPTH => self.pick(names).into(),
            2 if depth < DEPTH => Value::Null,
            3 => self.split(names, depth, rules),
            4 if names.iter().any(|name| name == "true") => self.condition(depth - 1, rules),
            5 if depth > 1 => {
                let name: Value = self.pick(names).into();
                let parts = name.as_str().unwrap().split_at(1);
                json!({"cat": [parts.0, parts.1]})
            }
            _ => Value::Null,
        };
        if !made.is_null() || depth <= 1 {
            return made;
        }
        let mut parts = Vec::new();
        for _ in 0..=self.below(2) {
            parts.push(self.condition(depth - 1, rules));
            parts.push(self.answer(names, depth - 1, rules));
        }
        if !self.one_in(3) {
            parts.push(self.answer(names, depth - 1, rules));
        }
        json!({ "if": parts })
    }

    fn split(&mut self, names: &[String], depth: usize, rules: usize) -> Value {
        let mut parts = Vec::new();
        match self.below(4) {
            0 => parts.push(json!({"var": self.pick(&TEXT_ATTRIBUTES)})),
            1 => parts.push(json!({"var": self.pick(&["age", "vip", "user", "amount"])})),
            2 => parts.push(json!({"cat": [{"var": "$flagd.flagKey"}, {"var": ["email", "nobody"]}]})),
            _ => {}
        }
        for _ in 0..=self.below(3) {
            let variant =
                if self.one_in(10) { self.answer(names, depth.min(2), rules) } else { self.pick(names).into() };
            parts.push(match self.below(8) {
                0 => json!([variant]),
                1 => json!([variant, -5]),
                2 => json!([variant, {"-": [50, {"var": "percent"}]}]),
                _ => json!([variant, self.random.random_range(0..=100)]),
            });
        }
        // Without weight at all it is refused.
        parts.push(json!([self.pick(names), self.random.random_range(1..=100)]));
        json!({ "fractional": parts })
    }

    /// Something that is true or false, in most cases.
    fn condition(&mut self, depth: usize, rules: usize) -> Value {
        if self.one_in(ANYTHING) {
            return self.anything(depth);
        }
        if depth == 0 {
            return match self.below(3) {
                0 => json!({"var": "vip"}),
                1 => json!({"ends_with": [{"var": "email"}, "@staff.example"]}),
                _ => json!(self.random.random_bool(0.5)),
            };
        }
        let depth = depth - 1;
        match self.below(16) {
            0 => {
                let operator = self.pick(&["==", "===", "!=", "!=="]);
                json!({operator: [self.text(depth), self.text(depth)]})
            }
            1 => {
                let operator = self.pick(&["==", "===", "!=", "!=="]);
                json!({operator: [self.number(depth), self.number(depth)]})
            }
            2 => {
                let operator = self.pick(&["<", "<=", ">", ">="]);
                json!({operator: [self.number(depth), self.number(depth)]})
            }
            3 => {
                let operator = self.pick(&["<", "<="]);
                json!({operator: [self.number(depth), self.number(depth), self.number(depth)]})
            }
            4 => json!({"in": [self.text(depth), {"var": "roles"}]}),
            5 => {
                let list: Vec<_> = (0..self.below(5)).map(|_| self.pick(&TEXTS)).collect();
                json!({"in": [self.text(depth), list]})
            }
            6 => json!({"in": [self.pick(&TEXTS), self.text(depth)]}),
            7 | 8 => {
                let operator = self.pick(&["starts_with", "ends_with"]);
                let part = self.pick(&["a", "alice", "example", ".com", "@staff.example", "A", ""]);
                json!({operator: [self.text(depth), part]})
            }
            9 | 10 => {
                let sign = self.pick(&["=", "!=", "<", "<=", ">", ">=", "^", "~"]);
                json!({"sem_ver": [{"var": "version"}, sign, self.pick(&VERSIONS[..9])]})
            }
            11 => {
                let operator = self.pick(&["and", "or"]);
                let conditions: Vec<_> = (0..2 + self.below(2)).map(|_| self.condition(depth, rules)).collect();
                json!({operator: conditions})
            }
            12 => {
                let operator = self.pick(&["!", "!!"]);
                json!({operator: [self.condition(depth, rules)]})
            }
            13 => {
                let operator = self.pick(&["some", "all", "none"]);
                json!({operator: [{"var": "amounts"}, {">": [{"var": ""}, self.below(40)]}]})
            }
            14 if rules > 0 => json!({"$ref": format!("rule-{}", self.below(rules))}),
            14 => json!({"!": [{"missing": ["email", "plan"]}]}),
            _ => {
                let sign = self.pick(&["<", ">="]);
                json!({sign: [{"var": "$flagd.timestamp"}, self.pick(&[0, super::NOW, 2_000_000_000])]})
            }
        }
    }

    fn text(&mut self, depth: usize) -> Value {
        if self.one_in(ANYTHING) {
            return self.anything(depth);
        }
        match self.below(if depth == 0 { 5 } else { 8 }) {
            0 => self.pick(&TEXTS).into(),
            1..=3 => json!({"var": self.pick(&TEXT_ATTRIBUTES)}),
            4 => json!({"var": [self.pick(&["plan", "absent"]), "free"]}),
            5 => {
                json!({"cat": [self.text(depth - 1), self.pick(&[json!("-"), json!(7), json!("@")]), self.text(depth - 1)]})
            }
            6 => {
                let from = self.random.random_range(-4..5);
                json!({"substr": [self.text(depth - 1), from, self.random.random_range(1..4)]})
            }
            _ => json!({"if": [self.condition(depth - 1, 0), self.text(depth - 1), self.text(depth - 1)]}),
        }
    }

    fn number(&mut self, depth: usize) -> Value {
        if self.one_in(ANYTHING) {
            return self.anything(depth);
        }
        match self.below(if depth == 0 { 5 } else { 10 }) {
            0 => json!(self.random.random_range(-20..60)),
            1 => self.pick(&[json!(0.5), json!(2.25), json!(18), json!(0)]),
            2 | 3 => json!({"var": self.pick(&NUMBER_ATTRIBUTES)}),
            4 => json!({"var": [self.pick(&["age", "absent"]), 21]}),
            5 | 6 => {
                let operator = self.pick(&["+", "-", "*"]);
                json!({operator: [self.number(depth - 1), self.number(depth - 1)]})
            }
            7 => {
                let (operator, by) = (self.pick(&["/", "%"]), self.pick(&[2, 3, 4]));
                json!({operator: [self.number(depth - 1), by]})
            }
            8 => {
                let operator = self.pick(&["min", "max"]);
                json!({operator: [self.number(depth - 1), self.number(depth - 1)]})
            }
            _ => json!({"reduce": [{"var": "amounts"}, {"+": [{"var": "current"}, {"var": "accumulator"}]}, 0]}),
        }
    }

    /// A value of any kind.
    fn anything(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 6 } else { 9 }) {
            0 => Value::Null,
            1 => json!(self.random.random_bool(0.5)),
            2 => json!(self.random.random_range(-3..4)),
            3 => self.pick(&TEXTS).into(),
            4 => json!({"var": self.pick(&["email", "age", "vip", "roles", "user", "absent", "nothing", "amounts.1"])}),
            5 => json!(["a", 1]),
            6 => json!({"merge": [{"var": "roles"}, self.anything(depth - 1)]}),
            7 => json!({"map": [{"var": "amounts"}, {"*": [{"var": ""}, 2]}]}),
            _ => json!({"filter": [{"var": "amounts"}, {"<": [{"var": ""}, 20]}]}),
        }
    }

    fn context(&mut self) -> Value {
        let mut context = Map::new();
        if !self.one_in(10) {
            let key = if self.one_in(20) { String::new() } else { format!("user-{}", self.below(1_000)) };
            context.insert("targetingKey".into(), key.into());
        }
        let text = |this: &mut Self| Value::from(this.pick(&TEXTS));
        let number =
            |this: &mut Self| this.pick(&[json!(17), json!(18), json!(0), json!(-4), json!(42.5), json!(1_000_000)]);
        let whole = |this: &mut Self| Value::from((0..this.below(4)).map(|_| this.below(50)).collect::<Vec<_>>());
        let texts = |this: &mut Self| Value::from((0..this.below(4)).map(|_| this.pick(&TEXTS)).collect::<Vec<_>>());
        let attributes: [(&str, Make<'_>); 11] = [
            ("email", &text),
            ("country", &text),
            ("plan", &text),
            ("age", &number),
            ("amount", &number),
            ("percent", &|this| json!(this.below(60))),
            ("vip", &|this| json!(this.random.random_bool(0.5))),
            ("version", &|this| this.pick(&VERSIONS).into()),
            ("roles", &texts),
            ("amounts", &whole),
            ("user", &|this| json!({"name": this.pick(&TEXTS), "address": {"zip": this.below(9_999), "city": "Graz"}})),
        ];
        for (name, make) in attributes {
            if !self.one_in(6) {
                context.insert(name.into(), make(self));
            }
        }
        if self.one_in(4) {
            context.insert("nothing".into(), Value::Null);
        }
        context.into()
    }
}
