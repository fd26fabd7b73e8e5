(** The first-order bound for the MLP of a real model: SiLU, real numbers

    Claim.  For y(u) = W_d (silu(W_g u) ⊙ W_u u) over the reals, an update t dW
    with |t| <= 1 satisfies, in every coordinate,

      |y_tuned - (y + t shift)| <= t^2 C,

    with the constant C of glu_remainder_bound.v taken at K = 1/4; and likewise a
    steer t v at mlp_in.

    This joins glu_remainder_bound.v (any activation with a quadratic remainder)
    to silu_quadratic.v (SiLU has one).  Nothing else is assumed. *)
From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import Rstruct.
From Equiv Require Import basics glu_expansion glu_remainder_bound silu_quadratic.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** 1/4 is the same number in both libraries. *)
Lemma quarterE : (4%:R : R)^-1 = Rdiv 1 4.
Proof.
have four : (4%:R : R) = IZR 4.
  by rewrite -[4%:R]/(Rplus 1 (Rplus 1 (Rplus 1 1))); ring.
have n0 : (4%:R : R) != 0 by rewrite pnatr_eq0.
by rewrite -RinvE // four /Rdiv Rmult_1_l.
Qed.

(** |ρ(a, e)| <= e^2 / 4 for SiLU. *)
Lemma silu_act_rem (a e : R) : `|act_rem silu silu1 a e| <= 4%:R^-1 * e ^+ 2.
Proof. by rewrite quarterE -RpowE; apply/RleP/silu_quadratic. Qed.

Section SiLU.
Variables (d n o : nat).
Variables (Wg Wu dWg dWu : 'M[R]_(n, d)) (Wd dWd : 'M[R]_(o, n)) (u v : 'cV[R]_d).

(** Update: |y_tuned - (y + t shift)| <= t^2 C for |t| <= 1. *)
Theorem silu_first_order t i : `|t| <= 1 ->
  `|(glu silu (Wg + t *: dWg) (Wu + t *: dWu) (Wd + t *: dWd) u
     - (glu silu Wg Wu Wd u
        + t *: shift_update silu silu1 Wg Wu Wd dWg dWu dWd u)) i 0|
    <= t ^+ 2 * update_const silu silu1 4%:R^-1 Wg Wu dWg dWu Wd dWd u i 0.
Proof. exact: glu_first_order silu_act_rem _ _ _ _ _ _ _ _ _. Qed.

(** Steer at mlp_in: |y(u + t v) - (y(u) + t shift)| <= t^2 C for |t| <= 1. *)
Theorem silu_first_order_mlp_in t i : `|t| <= 1 ->
  `|(glu silu Wg Wu Wd (u + t *: v)
     - (glu silu Wg Wu Wd u
        + t *: shift_mlp_in silu silu1 Wg Wu Wd u v)) i 0|
    <= t ^+ 2 * mlp_in_const silu1 4%:R^-1 Wg Wu Wd u v i 0.
Proof. exact: glu_first_order_mlp_in silu_act_rem _ _ _ _ _ _ _. Qed.
End SiLU.
