(** SiLU has a quadratic remainder

    Claim.  For silu(x) = x / (1 + exp(-x)) and all real a, e,

      |silu(a + e) - silu(a) - silu'(a) e| <= e^2 / 4.

    The proof bounds the second derivative, |silu''| <= 1/2, and applies the mean
    value theorem twice.  At a = 0 it says that a SiLU steer with small inputs is half
    the linear one: |silu(e) - e/2| <= e^2 / 4.
    Not said here.  The constant 1/4 cannot be lowered, since silu''(0) = 1/2: tested,
    not proved.

    Setting.  The real numbers of Coq's standard library, derivatives from
    Coquelicot ([is_derive f x l]: f has derivative l at x). *)
From Coq Require Import Reals Psatz.
From Coquelicot Require Import Coquelicot.
Local Open Scope R_scope.

(** The logistic function s(x) = 1 / (1 + exp(-x)). *)
Definition sigm (x : R) : R := / (1 + exp (- x)).

(** silu(x) = x s(x) *)
Definition silu (x : R) : R := x * sigm x.

(** silu'(x) = s (1 + x (1 - s)) *)
Definition silu1 (x : R) : R := sigm x * (1 + x * (1 - sigm x)).

(** silu''(x) = s (1 - s) (2 + x (1 - 2 s)) *)
Definition silu2 (x : R) : R := sigm x * (1 - sigm x) * (2 + x * (1 - 2 * sigm x)).

(** 0 < s(x) < 1 *)
Lemma sigm_bounds x : 0 < sigm x < 1.
Proof.
pose proof (exp_pos (- x)); unfold sigm; split.
  apply Rinv_0_lt_compat; lra.
rewrite <- Rinv_1; apply Rinv_lt_contravar; lra.
Qed.

(** silu1 is the derivative of silu. *)
Theorem is_derive_silu (x : R) : is_derive silu x (silu1 x).
Proof.
pose proof (exp_pos (- x)); unfold silu, silu1, sigm; auto_derive; [lra|].
field; lra.
Qed.

(** silu2 is the derivative of silu1. *)
Lemma is_derive_silu1 x : is_derive silu1 x (silu2 x).
Proof.
pose proof (exp_pos (- x)); unfold silu1, silu2, sigm; auto_derive; [lra|].
field; lra.
Qed.

(** exp(x) >= 2 x - 1 for x >= 0, enough to dominate the tail. *)
Lemma exp_dominates x : 0 <= x -> 2 * x <= 1 + exp x.
Proof.
intros x0; pose proof (exp_ineq1_le (x / 2)).
replace (exp x) with (exp (x / 2) * exp (x / 2)) by (rewrite <- exp_plus; f_equal; lra).
assert ((1 + x / 2) * (1 + x / 2) <= exp (x / 2) * exp (x / 2)).
  apply Rmult_le_compat; lra.
pose proof (pow2_ge_0 (x / 2 - 1)); lra.
Qed.

(** s(-x) = 1 - s(x) *)
Lemma sigm_opp x : sigm (- x) = 1 - sigm x.
Proof.
pose proof (exp_pos x); unfold sigm; rewrite Ropp_involutive, exp_Ropp.
field; lra.
Qed.

(** 0 <= x (1 - s(x)) <= 1/2 for x >= 0. *)
Lemma tail_bound x : 0 <= x -> 0 <= x * (1 - sigm x) <= 1 / 2.
Proof.
intros x0; pose proof (exp_dominates x x0); pose proof (exp_pos x).
rewrite <- sigm_opp; unfold sigm; rewrite Ropp_involutive.
split; [apply Rmult_le_pos; [lra|apply Rlt_le, Rinv_0_lt_compat; lra]|].
apply Rmult_le_reg_r with (1 + exp x); [lra|]; field_simplify; lra.
Qed.

(** s(x) >= 1/2 for x >= 0. *)
Lemma sigm_half x : 0 <= x -> 1 / 2 <= sigm x.
Proof.
intros x0; pose proof (exp_ineq1_le x); unfold sigm; rewrite exp_Ropp.
assert (/ exp x <= 1) by (rewrite <- Rinv_1; apply Rinv_le_contravar; lra).
assert (0 < / exp x) by (apply Rinv_0_lt_compat; lra).
replace (1 / 2) with (/ 2) by lra; apply Rinv_le_contravar; lra.
Qed.

(** silu'' is even. *)
Lemma silu2_even x : silu2 (- x) = silu2 x.
Proof. unfold silu2; rewrite sigm_opp; ring. Qed.

(** |silu''| <= 1/2 *)
Lemma silu2_bound x : Rabs (silu2 x) <= 1 / 2.
Proof.
assert (P : forall x, 0 <= x -> Rabs (silu2 x) <= 1 / 2).
  clear x; intros x x0; pose proof (sigm_bounds x) as [s0 s1].
  pose proof (sigm_half x x0); pose proof (tail_bound x x0).
  set (s := sigm x) in *; set (b := x * (1 - s)) in *.
  assert (E : silu2 x = 2 * (s * (1 - s)) - s * (2 * s - 1) * b).
    unfold silu2, b; fold s; ring.
  assert (0 <= s * (1 - s) <= 1 / 4) by (split; nra).
  assert (0 <= s * (2 * s - 1) <= 1) by (split; nra).
  assert (0 <= s * (2 * s - 1) * b <= 1 / 2) by (split; nra).
  rewrite E; apply Rabs_le; lra.
destruct (Rle_dec 0 x); [auto|].
rewrite <- silu2_even; apply P; lra.
Qed.

(** Mean value theorem: f(b) - f(a) = f'(c) (b - a) for some c between a and b. *)
Lemma mvt f f' a b : (forall x, is_derive f x (f' x)) ->
  exists c, Rmin a b <= c <= Rmax a b /\ f b - f a = f' c * (b - a).
Proof.
intros D; apply MVT_gen; intros x _; [apply D|].
apply continuity_pt_filterlim, (ex_derive_continuous f); exists (f' x); apply D.
Qed.

(** |silu'(b) - silu'(a)| <= |b - a| / 2 *)
Lemma silu1_lipschitz a b : Rabs (silu1 b - silu1 a) <= 1 / 2 * Rabs (b - a).
Proof.
destruct (mvt silu1 silu2 a b is_derive_silu1) as [c [_ ->]].
rewrite Rabs_mult; apply Rmult_le_compat_r; [apply Rabs_pos|apply silu2_bound].
Qed.

(** |silu(a + e) - silu(a) - silu'(a) e| <= e^2 / 4 *)
Theorem silu_quadratic a e :
  Rabs (silu (a + e) - (silu a + silu1 a * e)) <= 1 / 4 * e ^ 2.
Proof.
assert (P : forall k, Rabs k = 1 ->
  0 <= 1 / 4 * e ^ 2 + k * (silu (a + e) - (silu a + silu1 a * e))).
- intros k k1.
  set (g := fun t => 1 / 4 * (t * e) ^ 2
                     + k * (silu (a + t * e) - (silu a + silu1 a * (t * e)))).
  set (g' := fun t => 1 / 2 * t * e ^ 2 + k * (e * (silu1 (a + t * e) - silu1 a))).
  destruct (mvt g g' 0 1) as [c [c01 E]].
    intros x; unfold g, g'.
    pose proof (is_derive_silu (a + x * e)) as D.
    auto_derive; [repeat split; eexists; apply D|].
    replace (Derive _ _) with (silu1 (a + x * e))
      by (symmetry; apply is_derive_unique, D).
    field.
  rewrite Rmin_left, Rmax_right in c01 by lra.
  unfold g in E; replace (a + 0 * e) with a in E by ring.
  replace (a + 1 * e) with (a + e) in E by ring.
  assert (0 <= g' c).
    pose proof (silu1_lipschitz a (a + c * e)) as L.
    replace (a + c * e - a) with (c * e) in L by ring.
    rewrite Rabs_mult, (Rabs_pos_eq c) in L by lra.
    assert (B : Rabs (k * (e * (silu1 (a + c * e) - silu1 a))) <= 1 / 2 * c * e ^ 2).
      rewrite !Rabs_mult, k1, Rmult_1_l, <- (pow2_abs e).
      pose proof (Rabs_pos e); nra.
    unfold g'; apply Rabs_le_between in B; lra.
  lra.
- apply Rabs_le; split; [pose proof (P 1 Rabs_R1); lra|].
  assert (N : Rabs (- (1)) = 1) by (rewrite Rabs_Ropp; apply Rabs_R1).
  pose proof (P (- (1)) N); lra.
Qed.

(** |silu(e) - e/2| <= e^2 / 4: near 0, SiLU is half the identity. *)
Theorem silu_half_linear e : Rabs (silu e - e / 2) <= 1 / 4 * e ^ 2.
Proof.
pose proof (silu_quadratic 0 e) as Q.
replace (silu (0 + e) - (silu 0 + silu1 0 * e)) with (silu e - e / 2) in Q; [auto|].
unfold silu1; replace (0 + e) with e by ring.
replace (silu 0) with 0 by (unfold silu; ring).
replace (sigm 0) with (1 / 2) by (unfold sigm; rewrite Ropp_0, exp_0; field).
field.
Qed.
