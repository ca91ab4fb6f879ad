//! Expressions over a graph's symbols, such as `"heads * head_dim"`.
//!
//! Owns their grammar and arithmetic: `+ - * /`, parentheses, names, numbers, `true` and `false`. Whole numbers stay whole:
//! overflow and a division with a remainder are errors, so a dimension is never silently rounded.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, Visitor};

/// Longest expression text; bounds the recursion of the parser.
const MAX_LENGTH: usize = 200;

/// What an expression comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(u64),
    /// Any other number.
    Real(f64),
    /// A condition.
    Bool(bool),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Int(int) => write!(f, "{int}"),
            Value::Real(real) => write!(f, "{real:?}"),
            Value::Bool(flag) => write!(f, "{flag}"),
        }
    }
}

/// An expression as written, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Expr {
    text: String,
    root: Term,
}

#[derive(Clone, Debug, PartialEq)]
enum Term {
    Value(Value),
    Name(String),
    Binary(char, Box<Term>, Box<Term>),
}

impl Expr {
    /// Parses an expression; the error says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MAX_LENGTH {
            return Err(format!("an expression has at most {MAX_LENGTH} characters"));
        }
        let mut parser = Parser { rest: text };
        let root = parser.sum()?;
        parser.skip_space();
        match parser.rest.chars().next() {
            None => Ok(Self {
                text: text.to_owned(),
                root,
            }),
            Some(found) => Err(format!(
                "expected an operator, found `{found}` in the expression `{text}`"
            )),
        }
    }

    /// The names it uses.
    pub fn names(&self) -> Vec<&str> {
        fn walk<'a>(term: &'a Term, names: &mut Vec<&'a str>) {
            match term {
                Term::Value(_) => {}
                Term::Name(name) => names.push(name),
                Term::Binary(_, left, right) => {
                    walk(left, names);
                    walk(right, names);
                }
            }
        }
        let mut names = Vec::new();
        walk(&self.root, &mut names);
        names
    }

    /// Its value; `lookup` gives the symbols' values. The error says what is wrong.
    pub fn evaluate(&self, lookup: &dyn Fn(&str) -> Option<Value>) -> Result<Value, String> {
        self.root.evaluate(lookup)
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Term {
    fn evaluate(&self, lookup: &dyn Fn(&str) -> Option<Value>) -> Result<Value, String> {
        match self {
            Term::Value(value) => Ok(*value),
            Term::Name(name) => lookup(name).ok_or_else(|| format!("`{name}` has no value")),
            Term::Binary(operator, left, right) => {
                apply(*operator, left.evaluate(lookup)?, right.evaluate(lookup)?)
            }
        }
    }
}

fn apply(operator: char, left: Value, right: Value) -> Result<Value, String> {
    let fault = |what: &str| format!("`{left} {operator} {right}` {what}");
    match (left, right) {
        (Value::Int(a), Value::Int(b)) => {
            let result = match operator {
                '+' => a.checked_add(b),
                '-' => a.checked_sub(b),
                '*' => a.checked_mul(b),
                _ if b == 0 => return Err(fault("divides by zero")),
                _ if a % b != 0 => return Err(fault("leaves a remainder")),
                _ => Some(a / b),
            };
            result
                .map(Value::Int)
                .ok_or_else(|| fault("is out of range"))
        }
        (left, right) => {
            let (Some(a), Some(b)) = (left.real(), right.real()) else {
                return Err(fault("computes with a condition"));
            };
            let result = match operator {
                '+' => a + b,
                '-' => a - b,
                '*' => a * b,
                _ => a / b,
            };
            if result.is_finite() {
                Ok(Value::Real(result))
            } else {
                Err(fault("is not a finite number"))
            }
        }
    }
}

impl Value {
    fn real(self) -> Option<f64> {
        match self {
            Value::Int(int) => Some(int as f64),
            Value::Real(real) => Some(real),
            Value::Bool(_) => None,
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn operator(&mut self, choice: [char; 2]) -> Option<char> {
        self.skip_space();
        let found = self.rest.chars().next().filter(|c| choice.contains(c))?;
        self.rest = &self.rest[1..];
        Some(found)
    }

    fn sum(&mut self) -> Result<Term, String> {
        let mut left = self.product()?;
        while let Some(operator) = self.operator(['+', '-']) {
            left = Term::Binary(operator, Box::new(left), Box::new(self.product()?));
        }
        Ok(left)
    }

    fn product(&mut self) -> Result<Term, String> {
        let mut left = self.atom()?;
        while let Some(operator) = self.operator(['*', '/']) {
            left = Term::Binary(operator, Box::new(left), Box::new(self.atom()?));
        }
        Ok(left)
    }

    fn take(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn atom(&mut self) -> Result<Term, String> {
        self.skip_space();
        match self.rest.chars().next() {
            Some('(') => {
                self.rest = &self.rest[1..];
                let inner = self.sum()?;
                self.skip_space();
                self.rest = self
                    .rest
                    .strip_prefix(')')
                    .ok_or("expected `)` in an expression")?;
                Ok(inner)
            }
            Some(first) if first.is_ascii_digit() => self.number(),
            Some(first) if first.is_alphabetic() || first == '_' => {
                Ok(match self.take(|c| c.is_alphanumeric() || c == '_') {
                    "true" => Term::Value(Value::Bool(true)),
                    "false" => Term::Value(Value::Bool(false)),
                    name => Term::Name(name.to_owned()),
                })
            }
            Some(found) => Err(format!("expected a name or a number, found `{found}`")),
            None => Err("expected a name or a number at the end of an expression".to_owned()),
        }
    }

    fn number(&mut self) -> Result<Term, String> {
        let start = self.rest;
        self.take(|c| c.is_ascii_alphanumeric() || c == '.' || c == '_');
        // The sign of an exponent, as in `1e-6`.
        let taken = &start[..start.len() - self.rest.len()];
        if taken.ends_with(['e', 'E']) && self.rest.starts_with(['-', '+']) {
            self.rest = &self.rest[1..];
            self.take(|c| c.is_ascii_digit());
        }
        let text = start[..start.len() - self.rest.len()].replace('_', "");
        if let Ok(int) = text.parse() {
            return Ok(Term::Value(Value::Int(int)));
        }
        match text.parse::<f64>() {
            Ok(real) if real.is_finite() => Ok(Term::Value(Value::Real(real))),
            _ => Err(format!("`{text}` is not a number")),
        }
    }
}

impl<'de> Deserialize<'de> for Expr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ExprVisitor;
        impl Visitor<'_> for ExprVisitor {
            type Value = Expr;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or an expression in quotes such as \"heads * head_dim\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Expr, E> {
                Expr::parse(text).map_err(E::custom)
            }
            fn visit_bool<E>(self, flag: bool) -> Result<Expr, E> {
                Ok(Expr {
                    text: flag.to_string(),
                    root: Term::Value(Value::Bool(flag)),
                })
            }
            fn visit_u64<E>(self, int: u64) -> Result<Expr, E> {
                Ok(Expr {
                    text: int.to_string(),
                    root: Term::Value(Value::Int(int)),
                })
            }
            fn visit_f64<E: serde::de::Error>(self, real: f64) -> Result<Expr, E> {
                if !real.is_finite() {
                    return Err(E::custom(format!("`{real}` is not a finite number")));
                }
                let value = Value::Real(real);
                Ok(Expr {
                    text: value.to_string(),
                    root: Term::Value(value),
                })
            }
            // RON reads a literal such as 1e-6 as f32 first; going through its shortest decimal form keeps 1e-6 what it says.
            fn visit_f32<E: serde::de::Error>(self, real: f32) -> Result<Expr, E> {
                self.visit_f64(real.to_string().parse().map_err(E::custom)?)
            }
        }
        deserializer
            .deserialize_any(ExprVisitor)
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<Value, &str>) {
        let lookup = |name: &str| match name {
            "heads" => Some(Value::Int(16)),
            "eps" => Some(Value::Real(1e-6)),
            _ => None,
        };
        let result = Expr::parse(text).and_then(|expr| expr.evaluate(&lookup));
        match expect {
            Ok(value) => assert_eq!(result, Ok(value), "{text}"),
            Err(part) => assert!(
                result.clone().is_err_and(|e| e.contains(part)),
                "{text}: {result:?}"
            ),
        }
    }

    #[test]
    fn arithmetic_and_its_faults() {
        check("heads * (2 + 6)", Ok(Value::Int(128)));
        check("2 + heads / 8 - 1", Ok(Value::Int(3)));
        check("1e-6", Ok(Value::Real(1e-6)));
        check("eps * 2", Ok(Value::Real(2e-6)));
        check("true", Ok(Value::Bool(true)));
        check("heads / 3", Err("leaves a remainder"));
        check("heads / 0", Err("divides by zero"));
        check("1 - heads", Err("out of range"));
        check("18446744073709551615 * 2", Err("out of range"));
        check("1.5 / 0", Err("not a finite"));
        check("true + 1", Err("condition"));
        check("heds", Err("`heds` has no value"));
        check("heads *", Err("at the end"));
        check("(heads", Err("expected `)`"));
        check("heads é", Err("expected an operator"));
        check("", Err("expected a name"));
        check(&"(".repeat(1000), Err("at most"));
    }
}
