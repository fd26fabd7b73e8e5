(** One set of real numbers, two notations

    The standard library (used for exp, ln and derivatives) and MathComp (used for
    sums and matrices) write arithmetic on the same reals in two ways.  These lemmas
    translate. *)
From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import Rstruct.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** From here on + and / between reals are MathComp's, inside exp and ln too. *)
Bind Scope ring_scope with R.
Arguments exp x%ring_scope.
Arguments ln x%ring_scope.

(** The natural number n, as a real. *)
Lemma natrE n : (n%:R : R) = IZR (Z.of_nat n).
Proof. by rewrite -INRE INR_IZR_INZ. Qed.

(** Division by a positive natural number. *)
Lemma div_natrE (x : R) n : x / n.+1%:R = Rdiv x (IZR (Z.of_nat n.+1)).
Proof. by rewrite -natrE RdivE // pnatr_eq0. Qed.

(** exp(x) > 0 *)
Lemma exp_gt0 (x : R) : 0 < exp x.
Proof. by apply/RltP/exp_pos. Qed.

(** ln(x y) = ln x + ln y for positive x, y. *)
Lemma lnM (x y : R) : 0 < x -> 0 < y -> ln (x * y) = ln x + ln y.
Proof. by move=> /RltP x0 /RltP y0; exact: ln_mult. Qed.

(** 1 - 1/x <= ln x for positive x. *)
Lemma ln_ge (x : R) : 0 < x -> 1 - x^-1 <= ln x.
Proof.
move=> x0; have le1 : 1 - ln x <= x^-1.
  apply/RleP; rewrite -RinvE ?gt_eqF // -{2}[x]exp_ln; last exact/RltP.
  by rewrite -exp_Ropp; exact: exp_ineq1_le.
have := le_add le1 (lexx (ln x - x^-1)).
by rewrite addrA subrK [x^-1 + _]addrC subrK.
Qed.

(** A sum of positive terms, at least one, is positive. *)
Lemma sum_gt0 n (x : 'I_n.+1 -> R) : (forall i, 0 < x i) -> 0 < \sum_i x i.
Proof.
move=> x0; rewrite big_ord_recl; apply: lt_le_trans (x0 ord0) _.
by rewrite le_addl sumr_ge0 // => i _; exact: ltW.
Qed.
