(** KL divergence between two softmax distributions

    Claims.  For logits z and a change δ of the logits,

      KL(softmax z ‖ softmax(z + δ)) = ln sum_i p_i exp(δ_i) - sum_i p_i δ_i,
                                        p = softmax z;
      0 <= KL <= (b - a)^2 / 8          if a <= δ_i <= b for all i,
           KL <= ||δ||^2 / 4            (Euclidean norm),
           KL <= c^2 / 2                if |δ_i| <= c for all i.

    Since z and δ are arbitrary, the same bounds hold with the two distributions
    exchanged.

    Assumptions.  At least one logit; real arithmetic.

    Not said here.  For small δ the divergence is 1/2 δ^T (diag p - p p^T) δ to
    leading order, often much smaller than these bounds. *)
From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import Rstruct.
From Equiv Require Import basics real_numbers hoeffding.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Kl.
Variable n : nat.
Implicit Types (z d p q : 'I_n.+1 -> R).

(** softmax(z)_i = exp(z_i) / sum_j exp(z_j) *)
Definition softmax z i := exp (z i) / \sum_j exp (z j).

(** KL(p ‖ q) = sum_i p_i ln(p_i / q_i) *)
Definition kl p q := \sum_i p i * ln (p i / q i).

(** softmax is positive. *)
Lemma softmax_gt0 z i : 0 < softmax z i.
Proof. by rewrite /softmax divr_gt0 ?exp_gt0 // sum_gt0 // => j; exact: exp_gt0. Qed.

(** softmax sums to 1. *)
Lemma softmax_sum z : \sum_i softmax z i = 1.
Proof.
by rewrite -mulr_suml mulfV // gt_eqF // sum_gt0 // => j; exact: exp_gt0.
Qed.

(** E δ = sum_i p_i δ_i under p = softmax z. *)
Definition mean z d := \sum_i softmax z i * d i.

(** E exp(δ) = sum_i p_i exp(δ_i) under p = softmax z. *)
Definition mean_exp z d := \sum_i softmax z i * exp (d i).

(** E exp(δ) > 0 *)
Lemma mean_exp_gt0 z d : 0 < mean_exp z d.
Proof. by apply: sum_gt0 => i; rewrite mulr_gt0 ?softmax_gt0 ?exp_gt0. Qed.

(** p_i / q_i * exp(δ_i) = E exp(δ) for q = softmax(z + δ). *)
Lemma softmax_ratio z d i :
  softmax z i / softmax (fun j => z j + d j) i * exp (d i) = mean_exp z d.
Proof.
have E0 j : exp (z j + d j) = exp (z j) * exp (d j) by rewrite expRD.
have M : mean_exp z d = (\sum_j exp (z j + d j)) / \sum_j exp (z j).
  by rewrite mulr_suml; apply: eq_bigr => j _; rewrite E0 mulrAC.
have Z1 : \sum_j exp (z j + d j) != 0.
  by rewrite gt_eqF // sum_gt0 // => j; exact: exp_gt0.
have [a0 b0] : exp (z i) != 0 /\ exp (d i) != 0 by rewrite !gt_eqF ?exp_gt0.
rewrite M /softmax E0 invf_div; move: (\sum_j _) Z1 (\sum_j _) => Z' Z'0 Z.
rewrite [LHS]mulrAC [exp (z i) / Z * _]mulrAC [LHS]mulrC mulrA divfK //.
exact: mulf_neq0.
Qed.

(** KL(softmax z ‖ softmax(z + δ)) = ln E exp(δ) - E δ. *)
Theorem kl_softmax z d :
  kl (softmax z) (softmax (fun i => z i + d i)) = ln (mean_exp z d) - mean z d.
Proof.
rewrite /kl /mean -[ln _]mul1r -(softmax_sum z) mulr_suml -sumrB.
apply: eq_bigr => i _; rewrite -mulrBr; congr (_ * _).
have r0 : 0 < softmax z i / softmax (fun j => z j + d j) i.
  by rewrite divr_gt0 ?softmax_gt0.
by rewrite -(softmax_ratio z d i) (lnM r0) ?exp_gt0 // ln_exp addrK.
Qed.

(** KL >= 0, for any two distributions with positive entries. *)
Theorem kl_ge0 p q : (forall i, 0 < p i) -> (forall i, 0 < q i) ->
  \sum_i p i = 1 -> \sum_i q i = 1 -> 0 <= kl p q.
Proof.
move=> p0 q0 p1 q1; rewrite -[0](subrr 1) -{1}p1 -q1 -sumrB; apply: ler_sum => i _.
have := le_mul2l (ltW (p0 i)) (ln_ge (divr_gt0 (p0 i) (q0 i))).
by rewrite invf_div mulrBr mulr1 mulrCA mulfV ?mulr1 // gt_eqF.
Qed.

(** KL <= (b - a)^2 / 8 when a <= δ_i <= b. *)
Theorem kl_osc z d (a b : R) : (forall i, a <= d i <= b) ->
  kl (softmax z) (softmax (fun i => z i + d i)) <= (b - a) ^+ 2 / 8%:R.
Proof.
move=> dab; rewrite kl_softmax -(le_add2l (mean z d)) addrCA subrr addr0.
have p0 i := ltW (softmax_gt0 z i).
have ma : a <= mean z d.
  rewrite -[a]mul1r -(softmax_sum z) mulr_suml ler_sum // => i _.
  by rewrite le_mul2l //; have /andP[] := dab i.
have mb : mean z d <= b.
  rewrite -[b]mul1r -(softmax_sum z) mulr_suml ler_sum // => i _.
  by rewrite le_mul2l //; have /andP[] := dab i.
have [ab|ba] := ltP a b; last first.
  have dE i : d i = b by apply/le_anti; case/andP: (dab i) => ? ->; exact: le_trans ba _.
  have bE : b - a = 0.
    by apply/eqP; rewrite subr_eq0 eq_le ba (le_trans ma mb).
  have -> : mean_exp z d = exp b.
    by rewrite /mean_exp -[RHS]mul1r -(softmax_sum z) mulr_suml;
       apply: eq_bigr => i _; rewrite dE.
  have -> : mean z d = b.
    by rewrite /mean -[RHS]mul1r -(softmax_sum z) mulr_suml;
       apply: eq_bigr => i _; rewrite dE.
  by rewrite ln_exp bE expr0n mul0r addr0.
have chord : mean_exp z d * (b - a)
    <= (b - mean z d) * exp a + (mean z d - a) * exp b.
  have -> : b - mean z d = \sum_i softmax z i * (b - d i).
    under [RHS]eq_bigr do rewrite mulrBr.
    by rewrite sumrB -mulr_suml softmax_sum mul1r.
  have -> : mean z d - a = \sum_i softmax z i * (d i - a).
    under [RHS]eq_bigr do rewrite mulrBr.
    by rewrite sumrB -mulr_suml softmax_sum mul1r.
  rewrite !mulr_suml -big_split /= ler_sum // => i _.
  rewrite -!(mulrA (softmax z i)) -mulrDr le_mul2l //; have /andP[ad db] := dab i.
  by apply/RleP; apply: exp_below_chord; split; exact/RleP.
rewrite div_natrE -RpowE; apply/RleP; apply: hoeffding; last exact/RleP.
- exact/RltP.
- by split; apply/RleP.
- exact/RltP/mean_exp_gt0.
Qed.

(** KL <= c^2 / 2 when |δ_i| <= c for all i. *)
Theorem kl_max z d (c : R) : (forall i, `|d i| <= c) ->
  kl (softmax z) (softmax (fun i => z i + d i)) <= c ^+ 2 / 2%:R.
Proof.
move=> dc; have cd i : - c <= d i <= c by rewrite -ler_norml.
apply: le_trans (kl_osc z cd) _.
have E : Rdiv (pow (Rminus c (Ropp c)) 2) (IZR 8) = Rdiv (pow c 2) (IZR 2) by field.
by rewrite !div_natrE -!RpowE le_eqVlt; apply/orP; left; apply/eqP.
Qed.

(** Two different entries: (δ_j - δ_i)^2 <= 2 ||δ||^2. *)
Lemma sqr_diff_le d i j : (d j - d i) ^+ 2 <= 2%:R * \sum_k d k ^+ 2.
Proof.
have S0 (P : pred 'I_n.+1) : 0 <= \sum_(k | P k) d k ^+ 2.
  by apply: sumr_ge0 => k _; exact: sqr_ge0.
have [->|ij] := eqVneq j i; first by rewrite subrr expr0n mulr_ge0 ?ler0n.
rewrite (bigD1 i) //= (bigD1 j) //= addrA mulrDr.
apply: le_trans (_ : 2%:R * (d i ^+ 2 + d j ^+ 2) <= _); last first.
  by rewrite le_addl mulr_ge0 ?ler0n.
rewrite -subr_ge0; have -> : 2%:R * (d i ^+ 2 + d j ^+ 2) - (d j - d i) ^+ 2
  = (d i + d j) ^+ 2; last exact: sqr_ge0.
rewrite natrE -!RpowE; move: (d i) (d j) => x y.
have E : Rminus (Rmult (IZR 2) (Rplus (pow x 2) (pow y 2))) (pow (Rminus y x) 2)
  = pow (Rplus x y) 2 by ring.
exact: E.
Qed.

(** KL <= ||δ||^2 / 4 *)
Theorem kl_norm z d :
  kl (softmax z) (softmax (fun i => z i + d i)) <= (\sum_i d i ^+ 2) / 4%:R.
Proof.
have [i _ di] := @Order.TotalTheory.arg_minP _ _ _ ord0 xpredT d isT.
have [j _ dj] := @Order.TotalTheory.arg_maxP _ _ _ ord0 xpredT d isT.
have dij k : d i <= d k <= d j by rewrite di //; exact: dj.
apply: le_trans (kl_osc z dij) _.
have -> : (8%:R : R) = 2%:R * 4%:R by rewrite -natrM.
rewrite invfM mulrA le_mul2r ?invr_ge0 ?ler0n // mulrC.
apply: le_trans (le_mul2l _ (sqr_diff_le d i j)) _; rewrite ?invr_ge0 ?ler0n //.
by rewrite mulrA mulVf ?mul1r // pnatr_eq0.
Qed.
End Kl.
