//! From a JSON rule to a [`Rule`], once per configuration.

use super::evaluators::{Evaluators, Shared, Standing};
use super::node::{Affix, Arithmetic, Bucket, Each, Fold, Fractional, Hashing, Node, Order, Path, Var, Weight};
use super::{FRACTIONAL_V2, MAX_DEPTH, MAX_NODES, Rule};
use crate::fractional::MAX_WEIGHT_SUM;
use crate::semver::{Comparison, Version};
use serde_json::Value;
use std::fmt::Write as _;
use std::sync::Arc;

/// The operators, for those who mistyped one.
const OPERATORS: &str = "var, missing, missing_some, if, ?:, ==, ===, !=, !==, !, !!, and, or, <, <=, >, >=, max, min, \
     +, -, *, /, %, in, cat, substr, map, filter, reduce, all, some, none, merge, fractional, fractional_v2, sem_ver, \
     starts_with, ends_with, $ref";

/// Why a rule cannot be used, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {mistake}")]
pub struct RuleError {
    /// The place: `targeting.if[0].in` in the rule itself, `$evaluators.vip.in[1]` in a shared one.
    pub path: String,
    /// What is wrong there.
    pub mistake: Mistake,
}

/// What can be wrong with a rule, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// There is no such operator.
    #[error("{0} is not an operator; use one of {OPERATORS}")]
    UnknownOperator(String),
    /// An object that is no operation.
    #[error("must be an operation, an object with exactly one member; it has {0}: join several with and or or")]
    NotOneOperation(usize),
    /// Too few or too many values.
    #[error("takes {wanted}, found {found}")]
    Arity {
        /// How many it takes, in words.
        wanted: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A `$ref` to nothing.
    #[error("{name} is not among $evaluators ({known}); define it there, or correct the name")]
    UnknownEvaluator {
        /// What was referred to.
        name: String,
        /// What there is.
        known: String,
    },
    /// Shared rules that need each other.
    #[error("refers to itself: {0}; take one of the references out")]
    Cycle(String),
    /// Nested deeper than can be evaluated.
    #[error("is nested deeper than {MAX_DEPTH} levels, references included; make the rule flatter")]
    TooDeep,
    /// Larger than what is evaluated in time.
    #[error("has more than {MAX_NODES} parts; split the rule")]
    TooLarge,
    /// Anything else, in words.
    #[error("{0}")]
    Malformed(&'static str),
}

/// Something in a rule that works, and that its writer has hardly meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleWarning {
    /// The place, as in a [`RuleError`].
    pub path: String,
    /// What it does there, and what to write instead.
    pub message: &'static str,
}

/// What there is to say about a rule besides its first mistake.
#[derive(Debug, Default)]
pub(super) struct Remarks {
    /// The other mistakes, each in a part that is otherwise sound. At most [`MOST_REMARKS`].
    pub others: Vec<RuleError>,
    /// At most [`MOST_REMARKS`].
    pub warnings: Vec<RuleWarning>,
}

/// Most remarks of one kind about one rule.
const MOST_REMARKS: usize = 20;

/// Compiles the rule of a flag.
pub(super) fn compile(rule: &Value, evaluators: &Evaluators) -> (Result<Rule, RuleError>, Remarks) {
    let mut compiler = Compiler::new(evaluators, Root::Targeting);
    let root = compiler.node(rule, 0);
    let Compiler { uses_time, remarks, .. } = compiler;
    (root.map(|root| Rule { root, uses_time }), remarks)
}

/// Compiles the shared rule `name`, after those that it refers to.
pub(super) fn compile_shared(
    name: &str,
    rule: &Value,
    evaluators: &Evaluators,
) -> (Result<Shared, RuleError>, Remarks) {
    let mut compiler = Compiler::new(evaluators, Root::Shared(name));
    let node = compiler.node(rule, 0);
    let Compiler { deepest, uses_time, only_inside, remarks, .. } = compiler;
    (node.map(|node| Shared { node: Arc::new(node), height: deepest, uses_time, only_inside }), remarks)
}

/// What a path begins with.
#[derive(Clone, Copy)]
enum Root<'r> {
    Targeting,
    /// A shared rule of that name. Where it will stand is not known.
    Shared(&'r str),
}

/// A step further inside. Paths are spelled only for a mistake: most parts have none.
#[derive(Clone, Copy)]
enum Step<'r> {
    Member(&'r str),
    Item(usize),
}

struct Compiler<'r> {
    evaluators: &'r Evaluators,
    root: Root<'r>,
    path: Vec<Step<'r>>,
    parts: usize,
    deepest: usize,
    /// How many parts with a mistake there are so far.
    wrong: usize,
    /// After so many the rest of the rule is not looked at.
    most_wrong: usize,
    /// Why a shared rule cannot stand outside of operators over lists.
    only_inside: Option<RuleError>,
    /// How many operators over lists are around this place: inside of them, `var` looks into the item at hand.
    items: usize,
    uses_time: bool,
    remarks: Remarks,
}

type Compiled<T = Node> = Result<T, RuleError>;

impl<'r> Compiler<'r> {
    fn new(evaluators: &'r Evaluators, root: Root<'r>) -> Self {
        Self {
            evaluators,
            root,
            path: Vec::new(),
            parts: 0,
            deepest: 0,
            wrong: 0,
            most_wrong: if evaluators.wants_all_mistakes() { MOST_REMARKS + 1 } else { 1 },
            only_inside: None,
            items: 0,
            uses_time: false,
            remarks: Remarks::default(),
        }
    }

    /// The place at hand, as people read it.
    fn place(&self) -> String {
        let mut place = match self.root {
            Root::Targeting => "targeting".to_owned(),
            Root::Shared(name) => format!("$evaluators.{}", shortened(name)),
        };
        for step in &self.path {
            // Writing to a String cannot fail.
            let _ = match step {
                Step::Member(name) => write!(place, ".{}", shortened(name)),
                Step::Item(index) => write!(place, "[{index}]"),
            };
        }
        place
    }

    fn error<T>(&mut self, mistake: Mistake) -> Compiled<T> {
        self.wrong += 1;
        Err(RuleError { path: self.place(), mistake })
    }

    fn malformed<T>(&mut self, message: &'static str) -> Compiled<T> {
        self.error(Mistake::Malformed(message))
    }

    /// Keeps a mistake that is not the first.
    fn keep(&mut self, error: RuleError) {
        let others = &mut self.remarks.others;
        if others.len() < MOST_REMARKS && !others.contains(&error) {
            others.push(error);
        }
    }

    fn warn(&mut self, message: &'static str) {
        if self.remarks.warnings.len() < MOST_REMARKS && !self.evaluators.lenient {
            self.remarks.warnings.push(RuleWarning { path: self.place(), message });
        }
    }

    /// Does `work` for each of `items`, also after a mistake, so that a person is told of all of them, up to a number. The first
    /// is the error.
    fn each_of<I, T>(
        &mut self,
        items: impl IntoIterator<Item = I>,
        mut work: impl FnMut(&mut Self, I) -> Compiled<T>,
    ) -> Compiled<Vec<T>> {
        let (mut done, mut first) = (Vec::new(), None);
        for item in items {
            match work(self, item) {
                Ok(one) => done.push(one),
                // Nor is what follows looked at.
                Err(error) if error.mistake == Mistake::TooLarge || self.wrong >= self.most_wrong => {
                    return Err(match first {
                        None => error,
                        Some(first) => {
                            self.keep(error);
                            first
                        }
                    });
                }
                Err(error) if first.is_none() => first = Some(error),
                Err(error) => self.keep(error),
            }
        }
        first.map_or(Ok(done), Err)
    }

    /// Both, or the first mistake.
    fn both<A, B>(&mut self, one: Compiled<A>, other: Compiled<B>) -> Compiled<(A, B)> {
        match (one, other) {
            (Ok(one), Ok(other)) => Ok((one, other)),
            (Err(first), Err(second)) => {
                self.keep(second);
                Err(first)
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// A literal that its operation can do nothing with.
    fn no_use(&mut self, message: &'static str) -> Compiled {
        if self.evaluators.lenient { Ok(Node::Null) } else { self.malformed(message) }
    }

    /// Does `work` one step further inside.
    fn at<T>(&mut self, step: Step<'r>, work: impl FnOnce(&mut Self) -> Compiled<T>) -> Compiled<T> {
        self.path.push(step);
        let result = work(self);
        self.path.pop();
        result
    }

    /// What is only right inside of operators over lists is wrong here, or perhaps wrong where a shared rule will stand.
    fn outside(&mut self, message: &'static str) -> Compiled<()> {
        if self.items > 0 {
            return Ok(());
        }
        let error = RuleError { path: self.place(), mistake: Mistake::Malformed(message) };
        self.only_inside(error)
    }

    fn only_inside(&mut self, error: RuleError) -> Compiled<()> {
        match (self.items, self.root) {
            (0, Root::Targeting) => {
                self.wrong += 1;
                Err(error)
            }
            (0, Root::Shared(_)) => {
                self.only_inside.get_or_insert(error);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Counts a part at `depth`.
    fn part(&mut self, depth: usize) -> Compiled<()> {
        if depth > MAX_DEPTH {
            return self.error(Mistake::TooDeep);
        }
        self.deepest = self.deepest.max(depth);
        self.parts += 1;
        if self.parts > MAX_NODES { self.error(Mistake::TooLarge) } else { Ok(()) }
    }

    fn node(&mut self, value: &'r Value, depth: usize) -> Compiled {
        self.part(depth)?;
        Ok(match value {
            Value::Null => Node::Null,
            Value::Bool(value) => Node::Bool(*value),
            Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(value), _) => Node::Int(value),
                (None, Some(value)) => Node::Big(value),
                (None, None) => Node::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Node::Text(text.as_str().into()),
            Value::Array(items) => self.list(items, depth)?.map_or_else(|| Node::Json(value.clone()), Node::List),
            Value::Object(members) => {
                let mut all = members.iter();
                let (Some((name, argument)), None) = (all.next(), all.next()) else {
                    return self.error(Mistake::NotOneOperation(members.len()));
                };
                if name == "$ref" {
                    return self.reference(argument, depth);
                }
                self.at(Step::Member(name), |this| {
                    let arguments = Arguments {
                        values: argument.as_array().map_or(std::slice::from_ref(argument), Vec::as_slice),
                        listed: argument.is_array(),
                    };
                    this.operation(name, &arguments, depth + 1)
                })?
            }
        })
    }

    /// The items of a list at `depth`; `None`: nothing in it is computed. Lists in lists are copied once, by the outermost list
    /// in which nothing is computed.
    fn list(&mut self, items: &'r [Value], depth: usize) -> Compiled<Option<Box<[Node]>>> {
        let nodes = self.each_of(items.iter().enumerate(), |this, (at, item)| {
            this.at(Step::Item(at), |this| match item {
                Value::Array(inner) => {
                    this.part(depth + 1)?;
                    Ok(this.list(inner, depth + 1)?.map(Node::List))
                }
                other => this.node(other, depth + 1).map(Some),
            })
        })?;
        if nodes.iter().all(|node| node.as_ref().is_none_or(is_literal)) {
            return Ok(None);
        }
        Ok(Some(
            nodes.into_iter().zip(items).map(|(node, item)| node.unwrap_or_else(|| Node::Json(item.clone()))).collect(),
        ))
    }

    fn reference(&mut self, name: &'r Value, depth: usize) -> Compiled {
        let evaluators = self.evaluators;
        let mistake = match name.as_str().and_then(|name| evaluators.find(name)) {
            Some(Standing::Compiled(Ok(shared))) => {
                let deepest = depth + 1 + shared.height;
                if deepest <= MAX_DEPTH {
                    self.deepest = self.deepest.max(deepest);
                    self.uses_time |= shared.uses_time;
                    if let Some(error) = &shared.only_inside {
                        self.only_inside(error.clone())?;
                    }
                    return Ok(Node::Shared(Arc::clone(&shared.node)));
                }
                Mistake::TooDeep
            }
            Some(Standing::Compiled(Err(error))) => {
                self.wrong += 1;
                return Err(error.clone());
            }
            Some(Standing::Open(first)) => Mistake::Cycle(evaluators.round(*first)),
            None => Mistake::UnknownEvaluator {
                name: shortened(&name.as_str().map_or_else(|| name.to_string(), str::to_owned)),
                known: evaluators.some_names(),
            },
        };
        self.at(Step::Member("$ref"), |this| this.error(mistake))
    }

    fn operation(&mut self, name: &'r str, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        Ok(match name {
            "var" => self.var(arguments, depth)?,
            "if" | "?:" => Node::If(self.many(arguments, depth)?),
            "and" => Node::And(self.many(arguments, depth)?),
            "or" => Node::Or(self.many(arguments, depth)?),
            "!" => Node::Not(self.one(arguments, depth)?.into()),
            "!!" => Node::IsTrue(self.one(arguments, depth)?.into()),
            "==" | "===" | "!=" | "!==" => Node::Equal {
                strict: name.len() == 3,
                negated: name.starts_with('!'),
                sides: self.two(arguments, depth)?,
            },
            "<" => Node::Order(Order::Less, self.two_or_three(arguments, depth)?),
            "<=" => Node::Order(Order::LessOrEqual, self.two_or_three(arguments, depth)?),
            ">" => Node::Order(Order::Greater, self.two_or_three(arguments, depth)?),
            ">=" => Node::Order(Order::GreaterOrEqual, self.two_or_three(arguments, depth)?),
            "+" => Node::Fold(Fold::Sum, self.many(arguments, depth)?),
            "*" => Node::Fold(Fold::Product, self.many(arguments, depth)?),
            "min" => Node::Fold(Fold::Smallest, self.many(arguments, depth)?),
            "max" => Node::Fold(Fold::Largest, self.many(arguments, depth)?),
            "-" if arguments.values.len() == 1 => Node::Negate(self.one(arguments, depth)?.into()),
            "-" => Node::Arithmetic(Arithmetic::Minus, self.two(arguments, depth)?),
            "/" => Node::Arithmetic(Arithmetic::Divide, self.two(arguments, depth)?),
            "%" => Node::Arithmetic(Arithmetic::Modulo, self.two(arguments, depth)?),
            "in" => Node::In(self.two(arguments, depth)?),
            "cat" => Node::Cat(self.many(arguments, depth)?),
            "substr" => Node::Substr(self.up_to_three(arguments, depth)?),
            "missing" => self.missing(arguments, depth)?,
            "missing_some" => Node::MissingSome(self.two(arguments, depth)?),
            "merge" => Node::Merge(self.many(arguments, depth)?),
            "map" => self.each(Each::Map, arguments, depth)?,
            "filter" => self.each(Each::Filter, arguments, depth)?,
            "all" => self.each(Each::All, arguments, depth)?,
            "some" => self.each(Each::Some, arguments, depth)?,
            "none" => self.each(Each::None, arguments, depth)?,
            "reduce" => self.reduce(arguments, depth)?,
            "starts_with" => self.affix(Affix::Start, arguments, depth)?,
            "ends_with" => self.affix(Affix::End, arguments, depth)?,
            "sem_ver" => self.sem_ver(arguments, depth)?,
            "fractional" => self.fractional(Hashing::Canonical, arguments, depth)?,
            FRACTIONAL_V2 => self.fractional(Hashing::Plain, arguments, depth)?,
            _ => return self.error(Mistake::UnknownOperator(shortened(name))),
        })
    }

    /// The argument at `index`.
    fn argument(&mut self, arguments: &Arguments<'r>, index: usize, depth: usize) -> Compiled {
        let value = &arguments.values[index];
        if arguments.listed {
            self.at(Step::Item(index), |this| this.node(value, depth))
        } else {
            self.node(value, depth)
        }
    }

    fn exactly<const N: usize>(
        &mut self,
        arguments: &Arguments<'r>,
        depth: usize,
        wanted: &'static str,
    ) -> Compiled<Box<[Node; N]>> {
        let nodes = self.between(arguments, depth, N, N, wanted)?;
        let found = nodes.len();
        nodes.try_into().or_else(|_| self.error(Mistake::Arity { wanted, found }))
    }

    fn between(
        &mut self,
        arguments: &Arguments<'r>,
        depth: usize,
        least: usize,
        most: usize,
        wanted: &'static str,
    ) -> Compiled<Box<[Node]>> {
        let found = arguments.values.len();
        if found < least || found > most {
            return self.error(Mistake::Arity { wanted, found });
        }
        Ok(self.each_of(0..found, |this, index| this.argument(arguments, index, depth))?.into_boxed_slice())
    }

    fn many(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled<Box<[Node]>> {
        self.between(arguments, depth, 1, usize::MAX, "one value or more")
    }

    fn one(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let [node] = *self.exactly::<1>(arguments, depth, "one value")?;
        Ok(node)
    }

    fn two(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled<Box<[Node; 2]>> {
        self.exactly(arguments, depth, "two values")
    }

    fn two_or_three(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled<Box<[Node]>> {
        self.between(arguments, depth, 2, 3, "two or three values")
    }

    /// Two values or three; a third that is not there is null.
    fn up_to_three(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled<Box<[Node; 3]>> {
        let mut nodes = self.two_or_three(arguments, depth)?.into_vec();
        nodes.resize(3, Node::Null);
        nodes.into_boxed_slice().try_into().or_else(|_| self.error(Mistake::TooLarge))
    }

    fn var(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let nodes = self.between(arguments, depth, 0, 2, "a path and perhaps a default")?;
        let mut nodes = nodes.into_iter();
        let path = match nodes.next().unwrap_or(Node::Null) {
            Node::Null => Path::Known(Box::new([])),
            Node::Text(path) if path.is_empty() => Path::Known(Box::new([])),
            Node::Text(path) => {
                // Each name is looked up and held, as a part is.
                self.parts = self.parts.saturating_add(path.bytes().filter(|byte| *byte == b'.').count());
                if self.parts > MAX_NODES {
                    return self.error(Mistake::TooLarge);
                }
                Path::Known(path.split('.').map(Into::into).collect())
            }
            Node::Int(index) => Path::Known(Box::new([index.to_string().into()])),
            Node::Bool(_) | Node::Big(_) | Node::Float(_) | Node::Json(_) | Node::List(_) => {
                return self.malformed("needs the name of an attribute, such as email or user.country");
            }
            computed => Path::Computed(computed),
        };
        match &path {
            Path::Known(names) => match names.first().map(|name| &**name) {
                None => self.outside("names no attribute; outside of map, filter and the like it needs a name")?,
                Some("$flagd") => match names.get(1).map(|name| &**name) {
                    Some("timestamp") if names.len() == 2 => self.uses_time = true,
                    Some("flagKey") if names.len() == 2 => {}
                    _ => self.outside("only $flagd.flagKey and $flagd.timestamp exist")?,
                },
                Some(_) => {}
            },
            // It may turn out to be the timestamp.
            Path::Computed(_) => self.uses_time = true,
        }
        Ok(Node::Var(Box::new(Var { path, default: nodes.next().unwrap_or(Node::Null) })))
    }

    fn missing(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        // Any name may be asked for, the timestamp too.
        self.uses_time = true;
        Ok(Node::Missing(self.between(arguments, depth, 0, usize::MAX, "names")?))
    }

    /// What is done with each item, in which `var` looks into the item.
    fn per_item(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        self.items += 1;
        let node = self.argument(arguments, 1, depth);
        self.items -= 1;
        node
    }

    fn each(&mut self, each: Each, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let found = arguments.values.len();
        if found != 2 {
            return self.error(Mistake::Arity { wanted: "a list, and what is asked of each item", found });
        }
        let (list, per_item) = (self.argument(arguments, 0, depth), self.per_item(arguments, depth));
        let (list, per_item) = self.both(list, per_item)?;
        Ok(Node::Each(each, Box::new([list, per_item])))
    }

    fn reduce(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let found = arguments.values.len();
        if !(2..=3).contains(&found) {
            let wanted = "a list, what is done with each item, and perhaps a value to begin with";
            return self.error(Mistake::Arity { wanted, found });
        }
        let (list, step) = (self.argument(arguments, 0, depth), self.per_item(arguments, depth));
        let both = self.both(list, step);
        let first = if found == 3 { self.argument(arguments, 2, depth) } else { Ok(Node::Null) };
        let ((list, step), first) = self.both(both, first)?;
        Ok(Node::Reduce(Box::new([list, step, first])))
    }

    fn sem_ver(&mut self, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let [left, sign, right] = *self.exactly::<3>(arguments, depth, "a version, a comparison and a version")?;
        let comparison = if let Node::Text(sign) = &sign { Comparison::from_sign(sign) } else { None };
        let no_version = |side: &Node| match side {
            Node::Text(text) => Version::parse(text).is_none(),
            // A number is read as the text that it is.
            Node::Int(_) | Node::Float(_) => false,
            other => is_literal(other),
        };
        let wrong = [
            (0, no_version(&left), "must be a version such as 1.2.3"),
            (1, comparison.is_none(), "must be one of =, !=, <, <=, >, >=, ^ and ~"),
            (2, no_version(&right), "must be a version such as 1.2.3"),
        ];
        self.without_use(wrong)?;
        let useful = comparison.filter(|_| wrong.iter().all(|(_, wrong, _)| !wrong));
        Ok(useful.map_or(Node::Null, |comparison| Node::SemVer(comparison, Box::new([left, right]))))
    }

    fn affix(&mut self, affix: Affix, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let sides = self.two(arguments, depth)?;
        let no_text = |side: &Node| is_literal(side) && !matches!(side, Node::Text(_));
        let wrong = [
            (0, no_text(&sides[0]), "must be a text, or an operation that answers with one"),
            (1, no_text(&sides[1]), "must be a text, or an operation that answers with one"),
        ];
        self.without_use(wrong)?;
        Ok(if wrong.iter().any(|(_, wrong, _)| *wrong) { Node::Null } else { Node::Affix(affix, sides) })
    }

    /// Literals, by the place of each, with which an operation is of no use: a mistake, or null where that is let pass.
    fn without_use<const N: usize>(&mut self, literals: [(usize, bool, &'static str); N]) -> Compiled<()> {
        let wrong = literals.into_iter().filter(|(_, wrong, _)| *wrong);
        self.each_of(wrong, |this, (index, _, message)| this.at(Step::Item(index), |this| this.no_use(message)))?;
        Ok(())
    }

    fn fractional(&mut self, hashing: Hashing, arguments: &Arguments<'r>, depth: usize) -> Compiled {
        let (bucket_by, first) = match arguments.values.first() {
            Some(Value::Array(_)) | None => (None, 0),
            Some(_) => (Some(self.argument(arguments, 0, depth)), 1),
        };
        let lists = arguments.values.iter().enumerate().skip(first);
        let buckets =
            self.each_of(lists, |this, (index, bucket)| this.at(Step::Item(index), |this| this.bucket(bucket, depth)));
        let (bucket_by, buckets) = self.both(bucket_by.transpose(), buckets)?;
        let buckets: Option<Box<[_]>> = buckets.into_iter().collect();
        let Some(buckets) = buckets else { return Ok(Node::Null) };
        if buckets.is_empty() || !arguments.listed {
            return self.no_use("needs buckets, such as [\"on\", 10], [\"off\", 90]");
        }
        let known =
            |bucket: &Bucket| if let Weight::Known(weight) = bucket.weight { Some(u64::from(weight)) } else { None };
        let total = match buckets.iter().map(known).sum::<Option<u64>>() {
            Some(0) => return self.no_use("needs a weight above 0"),
            Some(total) => match u32::try_from(total) {
                Ok(total) if total <= MAX_WEIGHT_SUM => Some(total),
                _ => return self.no_use("the weights must not add up to more than 2147483647; make them smaller"),
            },
            None => None,
        };
        if bucket_by.as_ref().is_some_and(is_literal) {
            let message = "is the same for everybody, so all are in one bucket; to split by an attribute write it \
                           as {\"var\": \"email\"}, by targetingKey leave it out";
            self.at(Step::Item(0), |this| {
                this.warn(message);
                Ok(())
            })?;
        }
        Ok(Node::Fractional(Box::new(Fractional { hashing, bucket_by, buckets, total })))
    }

    /// A bucket; `None`: it is none, and so the split is null.
    fn bucket(&mut self, bucket: &'r Value, depth: usize) -> Compiled<Option<Bucket>> {
        let lenient = self.evaluators.lenient;
        let Some(parts @ ([_] | [_, _])) = bucket.as_array().map(Vec::as_slice) else {
            if lenient {
                return Ok(None);
            }
            return self.malformed("must be a list of a variant and perhaps a weight, such as [\"on\", 10]");
        };
        let variant = self.at(Step::Item(0), |this| match this.node(&parts[0], depth + 1)? {
            Node::Json(_) | Node::List(_) if !lenient => this.malformed("must be the name of a variant"),
            variant => Ok(variant),
        });
        let Some(weight) = parts.get(1) else {
            return Ok(Some(Bucket { variant: variant?, weight: Weight::Known(1) }));
        };
        let weight = self.at(Step::Item(1), |this| match this.node(weight, depth + 1)? {
            // Rollouts are computed, and may come out below 0: that is nobody.
            Node::Int(weight) if weight <= i64::from(MAX_WEIGHT_SUM) => {
                Ok(Weight::Known(u32::try_from(weight).unwrap_or(0)))
            }
            Node::Float(weight) if weight.fract() == 0.0 && weight <= f64::from(MAX_WEIGHT_SUM) =>
            {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "guarded by the range check"
                )]
                Ok(Weight::Known(weight.max(0.0) as u32))
            }
            literal if !lenient && is_literal(&literal) => {
                this.malformed("must be a whole number of at most 2147483647")
            }
            computed => Ok(Weight::Computed(computed)),
        });
        let (variant, weight) = self.both(variant, weight)?;
        Ok(Some(Bucket { variant, weight }))
    }
}

/// The values of an operation. One that is alone may be written without a list.
struct Arguments<'r> {
    values: &'r [Value],
    listed: bool,
}

/// A name of any length, as a message holds it.
pub(super) fn shortened(name: &str) -> String {
    const MOST: usize = 64;
    if name.chars().nth(MOST).is_none() { name.to_owned() } else { name.chars().take(MOST).chain(['…']).collect() }
}

const fn is_literal(node: &Node) -> bool {
    matches!(
        node,
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Big(_) | Node::Float(_) | Node::Text(_) | Node::Json(_)
    )
}
